"""What RewardBench's own programs write about each item, as `bon.pools.Pools`: gold is whether an answer is right.

`rewardbench --save_all` and `scripts/run_rm.py` have scores_chosen and scores_rejected, a pair an item; `run_v2.py` has
`scores`, a list an item, whose first `num_correct` answers are right. Rows, or one object of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bon.pools import Pools, from_tables
from core.column_files import first_row
from core.errors import ArtefactError
from core.files import read_json, read_rows
from study.cells import Cells

KNOWN = ({"scores_chosen", "scores_rejected"}, {"scores", "num_correct"})
"""Columns by which version 1 and version 2 are known."""
TIES = "ties"
"""Subset of RewardBench 2 whose items have more answers than others, and several that are right."""


def is_rewardbench(path: Path) -> bool:
    """Whether a file is one of these; of a file of rows only the first one is read."""
    if not path.is_file():
        return False
    return _is_known(first) if (first := _first(path)) else bool(rewardbench_rows(path))


def rewardbench_rows(path: Path) -> list[dict[str, Any]] | None:
    """The items of a file; None for a file of anything else."""
    rows = read_rows(path) if _first(path) else _of_columns(path)
    return rows if rows and _is_known(rows[0]) else None


def _first(path: Path) -> dict[str, Any]:
    """The first row; empty for an object of columns."""
    try:
        first = first_row(path)
    except ArtefactError:
        if path.suffix != ".json":
            raise
        return {}
    columns = isinstance(first.get("scores_chosen"), list) or isinstance(first.get("num_correct"), list)
    return {} if columns else first


def _is_known(row: Mapping[str, Any]) -> bool:
    return any(columns <= row.keys() for columns in KNOWN)


def _of_columns(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON object of columns of one length, and of values that all rows share; none of anything else."""
    try:
        table = read_json(path)
    except ArtefactError:  # lines
        return []
    if not isinstance(table, dict):
        return []
    columns = {name: values for name, values in table.items() if isinstance(values, list)}
    if len({len(values) for values in columns.values()}) != 1:
        return []
    same = {name: value for name, value in table.items() if name not in columns}
    return [dict(zip(columns, row, strict=True)) | same for row in zip(*columns.values(), strict=True)]


def rewardbench_pools(path: Path) -> Pools:
    """Pools of the items, without those of the subset Ties.

    Raises:
        ArtefactError: no such file, a score that is no number, or items with different numbers of answers.
    """
    rows = rewardbench_rows(path)
    if rows is None:
        raise ArtefactError("neither scores_chosen and scores_rejected nor scores and num_correct")
    samples: list[dict[str, Any]] = []
    gold: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        if str(row.get("subset")).lower() == TIES:
            continue
        cells = Cells(row, number)
        answers, right = _answers(cells)
        prompt = cells.prompt("prompt") if row.get("prompt") else [{"role": "user", "content": ""}]
        for k, (text, score) in enumerate(answers):
            ids = {"prompt_id": f"{number:06d}", "sample_id": k}
            samples.append({**ids, "response": text, "n_tokens": len(text), "prompt": prompt})
            gold.append({**ids, "score": float(k < right)})
            scores.append({**ids, "score": score})
    if not samples:
        raise ArtefactError("no items but those of the subset Ties")
    name = str(rows[0].get("model") or path.stem.removesuffix("_outputs"))
    return from_tables(samples, gold, {name.rpartition("/")[2]: scores})


def _answers(row: Cells) -> tuple[Sequence[tuple[str, float]], int]:
    """(text, score) of each answer, the right ones first, and how many are right."""
    if "scores" not in row.values:
        sides = ("chosen", "rejected")
        return [(_text(row.values.get(f"text_{side}")), row.real(f"scores_{side}")) for side in sides], 1
    scores = row.reals("scores")
    texts = row.values.get("text") or [""] * len(scores)
    if not isinstance(texts, list) or len(texts) != len(scores):
        raise ArtefactError(f"row {row.number}: text is no list of {len(scores)} answers, as many as there are scores")
    return list(zip(map(_text, texts), scores, strict=True)), row.whole("num_correct")


def _text(value: Any) -> str:
    """An answer, which may be a whole chat or its rendering."""
    last = value[-1] if isinstance(value, list) and value else value
    return str(last["content"]) if isinstance(last, dict) and "content" in last else str(last or "")
