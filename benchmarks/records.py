"""What `make bench` writes: one record a row, each complete by itself, in one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from benchmarks.machine import Machine
from benchmarks.statistics import Ratio, Run, Spread
from core.files import read_json, write_json


class Agreement(TypedDict):
    """A comparison of the two sides' results."""

    what: str
    ok: bool
    detail: str
    """The numbers."""


class Side(TypedDict):
    """Ours or theirs."""

    name: str
    versions: dict[str, str]
    settings: dict[str, Any]
    runs: list[Run]
    seconds: Spread
    """Of one run."""
    rate: Spread
    """Work per second."""
    results: Any
    """What it found: losses, rewards, tokens, seconds of phases."""


class Record(TypedDict):
    """A measured row. Without `ratio` it failed, and `error` says why."""

    title: str
    unit: str
    """Of the work: pairs, tokens, responses."""
    ratio_of: Ratio
    reach: float
    """The ratio that the project wants to reach: at least, or for a cost at most."""
    inputs: str
    """What both sides were given."""
    same: str
    """What is equal on both sides."""
    differs: str
    """What is not."""
    command: str
    date: str
    """UTC, ISO 8601."""
    commit: str
    """`+`: the files differed from it."""
    machine: Machine
    others_cpu: float | None
    """Share of the machine's CPU time that other programs used meanwhile, 0 to 1."""
    seconds: float
    """That measuring the row took, starting both sides included."""
    ours: NotRequired[Side]
    theirs: NotRequired[Side]
    ratio: NotRequired[Spread]
    agreement: NotRequired[list[Agreement]]
    error: NotRequired[str]


Results = dict[str, Record]
"""Name of the row -> its record, in the order of the table."""


def read(file: Path) -> Results:
    """Empty where there is no file."""
    return read_json(file)["rows"] if file.is_file() else {}


def write(file: Path, results: Results) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"format": 1, "rows": results})


def agrees(what: str, ok: bool, detail: str) -> Agreement:
    return {"what": what, "ok": bool(ok), "detail": detail}
