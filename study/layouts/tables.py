"""Scores as tables: one file of a row a sample, or the folder of our own stage `bon`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bon.joining import Keys
from bon.pools import Pools, Scores, from_columns
from bon.scores import IDS, pools_of_files
from core.column_files import Kind, first_row, pick, read_columns
from core.errors import ArtefactError
from study.cells import Cells

NO_PROXY = {
    "prompt_id", "sample_id", "gold", "gold2", "prompt", "response", "n_tokens", "length", "logp", "logp_sampler",
}  # fmt: skip
"""Columns that are no proxy, whatever they hold."""


def folder_pools(folder: Path) -> Pools:
    """Pools of samples.parquet and scores/NAME.parquet; gold2 is a second gold."""
    files = {file.stem: file for file in sorted((folder / "scores").glob("*.parquet"))}
    if "gold" not in files or len(files) < 2 or not (folder / "samples.parquet").is_file():
        raise ArtefactError("a folder holds samples.parquet, scores/gold.parquet and scores/PROXY.parquet")
    gold, second = files.pop("gold"), files.pop("gold2", None)
    try:
        return pools_of_files(folder / "samples.parquet", gold, files, second)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ArtefactError(f"its tables are not like those of stage bon ({what})") from None


def table_pools(path: Path) -> Pools:
    """Pools of a file with prompt_id, sample_id, gold and a column of numbers for each proxy."""
    first = first_row(path)
    if missing := [c for c in ("prompt_id", "sample_id", "gold") if c not in first]:
        raise ArtefactError(f"no column {', '.join(missing)}; it has {', '.join(first)}")
    proxies = proxy_columns(first)
    if not proxies:
        raise ArtefactError("no proxy: every further column of numbers is one")
    golds = [c for c in ("gold", "gold2") if c in first]
    wanted: dict[str, tuple[str, Kind]] = {c: (c, "number") for c in (*golds, *proxies)} | IDS
    for name, columns in (("\0length", ("n_tokens", "length")), ("\0logp", ("logp_sampler", "logp"))):
        if column := next((c for c in columns if c in first), None):
            wanted[name] = (column, "number")
    if "response" in first:
        wanted["\0texts"] = ("response", "text")
        wanted.setdefault("\0length", ("response", "length"))  # characters, where tokens are not known
    found = read_columns(path, wanted)
    keys = Keys(found.pop("prompt_id"), found.pop("sample_id"))
    scores = {name: Scores(keys, found.pop(name)) for name in (*golds, *proxies)}
    return from_columns(
        keys, scores.pop("gold"), {name: scores.pop(name) for name in proxies}, scores.get("gold2"),
        length=found.get("\0length"), logp=found.get("\0logp"), responses=found.get("\0texts"),
        prompts=_prompts(path, keys) if "prompt" in first else None,
    )  # fmt: skip


def proxy_columns(first: dict[str, Any]) -> list[str]:
    """Columns of a first row that hold numbers, and are nothing else."""
    return [column for column, value in first.items() if column not in NO_PROXY and is_number(value)]


def is_number(value: Any) -> bool:
    try:
        float(value)  # CSV has texts only
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _prompts(path: Path, keys: Keys) -> dict[str, str]:
    """Prompt id -> its text, from the first row of each: a text, or messages of which the last is the question."""
    rows = np.unique(keys.prompts.codes, return_index=True)[1].tolist()
    given = [Cells({"prompt": value}, row + 1) for row, value in zip(rows, pick(path, "prompt", rows), strict=True)]
    texts = [turns[-1]["content"] if (turns := cells.prompt("prompt")) else "" for cells in given]
    return dict(zip(keys.prompts.distinct, texts, strict=True))
