"""Best-of-n scores and RL series of other tools, as `bon.pools.Pools` and series. No model is run.

gold_labelled_gens  a row a prompt with lists of answers and of scores (Coste et al. 2310.02743), or a folder of such
                    files, one a seed (`study.layouts.answer_lists`)
grm                 a folder with proxy_score.csv and gold_score.csv, or one for each method (the GRM repository,
                    `study.layouts.grm_repository`)
rewardbench         results of each item, as RewardBench's programs write them; gold is whether an answer is right
table               one file of a row a sample: prompt_id, sample_id, gold and a column a proxy; or our own stage `bon`;
                    gold2, if present, is a second gold (`study.layouts.tables`)

Rows are joined by id, never by position: where a layout has no ids, texts are the ids. Only the columns that are used
are read, and texts are kept as long as they are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bon.pools import Pools
from core.column_files import first_row
from core.errors import ArtefactError
from core.row_files import numbered_rows
from study.cells import Cells
from study.design import Condition
from study.layouts.answer_lists import answer_files, answer_pools, is_answer_lists
from study.layouts.grm_repository import Chosen, grm_scores, is_grm
from study.layouts.tables import folder_pools, table_pools
from study.rewardbench import is_rewardbench, rewardbench_pools

LAYOUTS = ("gold_labelled_gens", "grm", "rewardbench", "table")
TEXTS = ("prompt", "response", "token_ids")
"""Columns of a series that nothing reads."""
SEED = re.compile(r"[-_.]s(?:eed)?[-_]?\d+(?=$|[-_.])")
"""A seed in a name."""
KLS = ("kl_rb", "kl_k1", "kl_k3", "kl")
"""Columns of a KL in nats, the best estimate first."""


def read_scores(path: Path, layout: str = "auto") -> Pools | Chosen:
    """Pools of a file or folder, or curves of chosen responses where gold covers only those (layout grm).

    Raises:
        ArtefactError: names the file, the rows and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise ArtefactError(f"--scores: no file or folder {path}")
    if layout == "auto":
        layout = _recognise(path)
    if layout not in LAYOUTS:
        raise ArtefactError(f"{path}: no layout {layout!r}; known are {', '.join(LAYOUTS)}")
    readers = {
        "gold_labelled_gens": answer_pools, "grm": grm_scores, "rewardbench": rewardbench_pools, "table": _table
    }  # fmt: skip
    try:
        return readers[layout](path)
    except ArtefactError as error:
        raise ArtefactError(f"{path} (read as {layout}): {error}") from None


def read_series(path: Path) -> list[dict]:
    """Rows of an RL series, by run and step: run, step, prompt_id, proxy, gold, kl (nats), kl_kind, and what else there
    is but texts.

    Raises:
        ArtefactError: missing columns, numbers that are not finite, the same run, seed, step, prompt and sample twice.
    """
    first = first_row(path)
    kl = next((c for c in KLS if c in first), None)
    missing = [c for c in ("run", "step", "prompt_id", "proxy", "gold") if c not in first]
    if missing or kl is None:
        missing += [] if kl else [f"one of {', '.join(KLS)}"]
        raise ArtefactError(f"{path}: no column {', '.join(missing)}; a row is one sample of one checkpoint")
    kind = {"kl_rb": "rb", "kl_k1": "k1", "kl_k3": "k3"}.get(kl, str(first.get("kl_kind", "as given")))
    found, seen = [], set()
    for number, (_, whole) in enumerate(numbered_rows(path), start=1):
        row = {column: value for column, value in whole.items() if column not in TEXTS}
        cells = Cells(row, number)
        try:
            numbers = {c: cells.real(c) for c in ("proxy", "gold", *(c for c in KLS if c in row or c == kl))}
            ids = {"run": cells.identity("run"), "prompt_id": cells.identity("prompt_id"), "step": cells.whole("step")}
            seed = cells.identity("seed") if row.get("seed") not in (None, "") else None
            sample = cells.identity("sample_id") if "sample_id" in row else "0"
        except ArtefactError as error:
            raise ArtefactError(f"{path}, {error}") from None
        key = (ids["run"], seed, ids["step"], ids["prompt_id"], sample)
        if key in seen:
            raise ArtefactError(f"{path}, row {number}: run, seed, step, prompt and sample {key} occur twice")
        seen.add(key)
        found.append({**row, **numbers, **ids, "kl": numbers[kl], "kl_kind": kind})
    return sorted(found, key=lambda r: (str(r["run"]), r["step"]))


def _recognise(path: Path) -> str:
    if path.is_dir():
        if is_grm(path) or (path / "gold_score.csv").is_file() or (path / "proxy_score.csv").is_file():
            return "grm"
        return "gold_labelled_gens" if not (path / "scores").is_dir() and answer_files(path) else "table"
    if is_rewardbench(path):
        return "rewardbench"
    return "gold_labelled_gens" if is_answer_lists(first_row(path)) else "table"


def _table(path: Path) -> Pools:
    return folder_pools(path) if path.is_dir() else table_pools(path)


def by_seed(names: Sequence[str]) -> dict[Condition, list[str]]:
    """Conditions of other tools' proxies: names that differ in `-seed3`, `_seed3` or `.s3` at their end only are seeds
    of one. Such names are all that their files say of the design."""
    groups: dict[Condition, list[str]] = {}
    for name in names:
        groups.setdefault(Condition(without_seed(name)), []).append(name)
    return groups


def without_seed(name: str) -> str:
    """A name without the last seed in it: `bt` of `bt-seed3`, `bt-kl0.1` of `bt-seed3-kl0.1`."""
    *_, last = [None, *SEED.finditer(name)]
    return name if last is None else name[: last.start()] + name[last.end() :]


def condition_of_run(run: str, conditions: Iterable[Condition]) -> Condition | None:
    """The condition whose name an RL run of other tools begins with, the longest one."""
    return max((c for c in conditions if run.startswith(c.name)), key=lambda c: len(c.name), default=None)
