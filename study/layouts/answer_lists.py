"""The `gold_labelled_gens` of Coste et al. (2310.02743): a row a prompt, with lists of its answers and of their scores.

    instruction, input, answers [N], gold_scores [N], proxy_scores [N] or several such columns

Their own code writes a file a seed, `runs/NAME/seed1/proxy_labelled_sorted.json`, each sorted by its own proxy. Such a
folder is read as a whole: its files are joined by the texts of prompts and answers. Their ensembles' files are left
out, since the gold in them was not sorted with the proxy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bon.pools import Pools
from core.column_files import KEPT_BYTES, Names, first_row
from core.errors import ArtefactError
from core.files import digest
from core.row_files import format_of, numbered_rows
from study.cells import Cells
from study.layouts.by_text import Scored, pools_by_text

if TYPE_CHECKING:
    import pyarrow as pa

ANSWERS, GOLD = "answers", "gold_scores"
WRITTEN = ("proxy_labelled_sorted", "proxy_labelled", "gold_labelled_gens")
"""Names of files that say nothing of their proxy."""


def is_answer_lists(first: dict[str, Any]) -> bool:
    return {ANSWERS, GOLD} <= first.keys()


def answer_files(folder: Path) -> list[Path]:
    """The files of this layout below a folder, without those of ensembles."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and format_of(f) in (".json", ".jsonl", ".parquet")]
    own = [f for f in files if not any(p.startswith("ensemble") for p in f.relative_to(folder).parts)]
    return [f for f in own if is_answer_lists(_first(f))]


def _first(file: Path) -> dict[str, Any]:
    try:
        return first_row(file)
    except ArtefactError:  # a file of something else, such as a configuration
        return {}


def answer_pools(path: Path) -> Pools:
    """Pools of a file, or of all such files of a folder."""
    files = answer_files(path) if path.is_dir() else [path]
    several = len(files) > 1
    return pools_by_text({str(f.relative_to(path) if several else f.name): _read(f, path, several) for f in files})


def _read(file: Path, folder: Path, several: bool) -> Scored:
    """One prompt is in memory as text at a time."""
    import pyarrow as pa

    columns: list[str] = []
    prompts: list[str] = []
    shown: dict[str, str] = {}
    sizes: list[int] = []
    scores: dict[str, list[np.ndarray]] = {}
    texts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    kept: list[pa.Array] | None = []
    size = 0
    for number, row in _rows(file):
        columns = columns or _proxies(row)
        cells = Cells(row, number)
        text = cells.text("instruction")
        if row.get("input"):
            text = f"{text}\n\n{cells.text('input')}"
        answers = cells.texts(ANSWERS)
        if (name := digest(text)) in shown:
            raise ArtefactError(f"row {number} has the same prompt as another one")
        for column in (GOLD, *columns):
            values = cells.reals(column)
            if len(values) != len(answers):
                raise ArtefactError(f"row {number} has {len(answers)} answers and {len(values)} {column}")
            scores.setdefault(column, []).append(np.asarray(values, dtype=np.float64))
        prompts.append(name)
        shown[name] = text
        sizes.append(len(answers))
        texts.append(np.array([int(digest(answer), 16) for answer in answers], dtype=np.uint64))
        lengths.append(np.array([len(answer) for answer in answers], dtype=np.int64))
        size += int(lengths[-1].sum())
        if kept is not None:
            kept.append(pa.array(answers, pa.large_string()))
            kept = kept if size < KEPT_BYTES else None
    joined = {column: np.concatenate(scores.pop(column)) for column in (GOLD, *columns)}
    names = Names(prompts, np.repeat(np.arange(len(prompts), dtype=np.int32), sizes))
    label = _label(file, folder) if several else ""
    proxies = {proxy_name(column, label): joined[column] for column in columns}
    return Scored(
        names,
        np.concatenate(texts),
        joined[GOLD],
        proxies,
        np.concatenate(lengths),
        kept and pa.chunked_array(kept),
        shown,
    )


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows, one at a time: a Parquet file of this layout has prompts of megabytes."""
    if format_of(file) != ".parquet":
        yield from numbered_rows(file)
        return
    import pyarrow.parquet as pq

    number = 0
    for batch in pq.ParquetFile(file).iter_batches(1):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _proxies(first: dict[str, Any]) -> list[str]:
    lists = [k for k, v in first.items() if isinstance(v, list) and k not in (ANSWERS, GOLD)]
    if not lists:
        raise ArtefactError("no proxy: add a column of as many scores as there are answers, proxy_scores for example")
    return lists


def proxy_name(column: str, label: str = "") -> str:
    """What a column of scores is called, so that columns which differ in their seed are seeds of one condition.

    `proxy_scores_seed1` is `proxy-seed1`, `proxy_scores_bt_seed1` is `bt_seed1`.

    Args:
        label: of the file, where there are several.
    """
    for affix in ("proxy_scores_", "proxy_score_"):
        column = column.removeprefix(affix)
    name = "proxy" if column in ("proxy_scores", "proxy_score") else column.removesuffix("_scores")
    if re.fullmatch(r"s(eed)?[-_]?\d+", name):
        name = f"proxy-{name}"
    if label:
        return label if name == "proxy" else f"{label}-{name}"
    return name


def _label(file: Path, folder: Path) -> str:
    """Of a file: the folders that it lies in and its own name, as far as they say something; `proxy-seed1` of
    seed1/proxy_labelled_sorted.json."""
    parts: Sequence[str] = [*file.relative_to(folder).parts[:-1], file.name.split(".")[0]]
    told = [part for part in parts if part not in WRITTEN]
    name = "-".join(told) or file.stem
    return f"proxy-{name}" if re.fullmatch(r"s(eed)?[-_]?\d+", name) else name
