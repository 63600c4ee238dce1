"""Measuring a row: both sides prepared and warmed up, then runs of the two in turn, A B A B."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine
from benchmarks.records import Agreement, Record, Side
from benchmarks.statistics import Ratio, Run, rate, ratios, spread
from benchmarks.workers import Program, Worker, WorkerError
from core.errors import ArtefactError, ConfigError, DataError

WARM_UP = 1
"""Runs of each side before the timed ones: the first one allocates, compiles and fills caches."""


@dataclass(frozen=True, slots=True)
class Task:
    """What the two sides of a row are given."""

    ours: dict[str, Any]
    """The job of our worker."""
    theirs: dict[str, Any]
    inputs: str
    """What the inputs are, for the reader."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    unit: str
    """Of the work of a run, in the plural."""
    reach: float
    """The ratio to reach: at least, or for a cost at most."""
    ours: Program
    theirs: Program
    theirs_name: str
    """For the reader, as `TRL 1.16 RewardTrainer`."""
    task: Callable[[int], Task]
    """Number of runs of each side, warm-up included -> what both are given."""
    compare: Callable[[Any, Any], list[Agreement]]
    """Results of ours and of theirs -> whether they agree."""
    same: str
    differs: str
    ratio_of: Ratio = "faster"
    ours_name: str = "grm-rlhf"


def measure(row: Row, pairs: int, logs: Path) -> Record:
    """Measure a row. A side that fails gives a record with its error.

    Args:
        pairs: timed runs of each side.
        logs: folder for what the two programs print.
    """
    started, others = time.monotonic(), machine.OthersShare()
    record: Record = {
        "title": row.title, "unit": row.unit, "ratio_of": row.ratio_of, "reach": row.reach, "inputs": "",
        "same": row.same, "differs": row.differs, "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": machine.commit(),
        "machine": machine.describe(), "others_cpu": None, "seconds": 0.0,
    }  # fmt: skip
    try:
        task = row.task(WARM_UP + pairs)
        record["inputs"] = task.inputs
        _alternate(row, task, pairs, logs, record, others)
    except (WorkerError, ArtefactError, DataError, ConfigError) as error:
        record["error"] = str(error)
    record["others_cpu"] = others.share()
    record["seconds"] = round(time.monotonic() - started, 1)
    return record


@dataclass(slots=True)
class _Turns:
    """One side's worker and its timed runs."""

    worker: Worker
    runs: list[Run]
    error: str | None = None
    """Why it runs no more."""

    def take(self, *, counts: bool) -> None:
        """One run, unless an earlier one failed."""
        if self.error:
            return
        try:
            seconds, work = self.worker.run()
        except WorkerError as error:
            self.error = str(error)
            return
        if counts:
            self.runs.append({"seconds": seconds, "work": work})


def _alternate(row: Row, task: Task, pairs: int, logs: Path, record: Record, others: machine.OthersShare) -> None:
    """Run both sides in turn and fill the record. Where only the peer fails, ours is still measured."""
    with ExitStack() as stack:
        ours = _Turns(stack.enter_context(Worker(row.ours, task.ours, logs / f"{row.name}-ours.log")), [])
        sides = [ours]
        try:
            theirs = _Turns(stack.enter_context(Worker(row.theirs, task.theirs, logs / f"{row.name}-theirs.log")), [])
            sides.append(theirs)
        except WorkerError as error:
            record["error"] = str(error)
        for number in tqdm(range(WARM_UP + pairs), desc=row.name, unit="pair"):
            for side in sides:
                side.take(counts=number >= WARM_UP)
            if ours.error:
                raise WorkerError(ours.error)
        record["ours"] = _side(row.ours_name, ours)
        if len(sides) == 2 and theirs.error:
            record["error"] = theirs.error
        elif len(sides) == 2:
            record["theirs"] = _side(row.theirs_name, theirs)
            record["agreement"] = row.compare(record["ours"]["results"], record["theirs"]["results"])
            record["ratio"] = spread(ratios(ours.runs, theirs.runs, row.ratio_of))
        others.note()


def _side(name: str, side: _Turns) -> Side:
    return {
        "name": name,
        "versions": side.worker.about["versions"],
        "settings": side.worker.about["settings"],
        "runs": side.runs,
        "seconds": spread([run["seconds"] for run in side.runs]),
        "rate": spread([rate(run) for run in side.runs]),
        "results": side.worker.check(),
    }
