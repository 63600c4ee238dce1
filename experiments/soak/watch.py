"""What the processes of a command hold: memory, file handles, threads, shared memory and temporary files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHARED = "dev/shm/"
MOST_COUNTED = 0.2
"""Share by which what is counted may be more in the last quarter than in the second: pools of threads fill slowly."""


class Held(NamedTuple):
    """At one moment, of all processes together."""

    seconds: float
    """Since the watch began."""
    done: int
    """Steps of PPO, or requests."""
    memory_mib: float
    """Proportional set size: a page that k processes share counts as a k-th in each."""
    handles: int
    threads: int
    temporary_files: int
    shared_segments: int | None = None
    """Files in /dev/shm that the processes have mapped or open; None where they were not counted."""


COUNTED = ("handles", "threads", "temporary_files", "shared_segments")


class Watch:
    """Looks at a command from time to time.

    Args:
        pids: the running processes of the command.
        done: how much of the work is done.
        temporary: the command's folder for temporary files.
        every: seconds between two looks.
    """

    def __init__(self, pids: Callable[[], Sequence[int]], done: Callable[[], int], temporary: Path, every: float = 2.0):
        self._pids, self._done, self._temporary, self.every = pids, done, temporary, every
        self._began, self._last = time.monotonic(), -every
        self.rows: list[Held] = []

    def look(self) -> None:
        """Add a row, if it is time for one and some work is done."""
        now = time.monotonic() - self._began
        if now - self._last < self.every or (done := self._done()) == 0:
            return
        self._last = now
        memory, handles, threads, segments = 0, 0, 0, set[str]()
        for pid in self._pids():
            folder = Path("/proc", str(pid))
            with suppress(OSError):  # ended meanwhile
                memory += _kib(folder / "smaps_rollup", "Pss:")
                opened = [os.readlink(file) for file in (folder / "fd").iterdir()]
                mapped = [line.partition("/")[2] for line in (folder / "maps").read_text().splitlines()]
                segments |= {name.strip("/") for name in (*opened, *mapped) if name.strip("/").startswith(SHARED)}
                handles += len(opened)
                threads += len(os.listdir(folder / "task"))
        temporary = sum(len(files) for _, _, files in os.walk(self._temporary))
        self.rows.append(Held(now, done, memory / 1024, handles, threads, temporary, len(segments)))


def _kib(file: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(key))


class Growth(NamedTuple):
    """How what is held changes between the second quarter of the work and the last one."""

    first: float
    """Median of the second quarter; the first one is left out, since caches fill then."""
    last: float

    @property
    def share(self) -> float:
        return self.last / self.first - 1 if self.first else float(self.last > 0)


def growths(rows: Sequence[Held]) -> dict[str, Growth]:
    """By the name of what is held.

    Raises:
        ValueError: fewer than eight looks.
    """
    if len(rows) < 8:
        raise ValueError(f"{len(rows)} looks are too few to tell whether anything grows")
    done = np.array([row.done for row in rows])
    quarter = np.minimum(4 * done // (done[-1] + 1), 3)
    found = {}
    for name in ("memory_mib", *COUNTED):
        if getattr(rows[0], name) is None:
            continue
        values = np.array([getattr(row, name) for row in rows], dtype=float)
        found[name] = Growth(float(np.median(values[quarter == 1])), float(np.median(values[quarter == 3])))
    return found


def faults(rows: Sequence[Held], most_memory: float) -> list[str]:
    """What grows, a line each: memory by more than the share `most_memory`, what is counted by more than a fifth.

    A leak of one in ten thousand requests is ten in a hundred thousand.
    """
    lines = []
    for name, growth in growths(rows).items():
        most = most_memory if name == "memory_mib" else MOST_COUNTED
        grows = growth.share > most and growth.last > growth.first + 1
        if grows:
            lines.append(f"{name.replace('_', ' ')} grows from {growth.first:.0f} to {growth.last:.0f}")
    return lines
