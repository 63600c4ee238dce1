"""The machine that a row was measured on, and how much of it others used meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from benchmarks.workers import ROOT
from core.config.base import native_dtype

TICKS = os.sysconf("SC_CLK_TCK")


class Machine(TypedDict):
    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float
    matrix_instructions: list[str]
    """Instructions for bfloat16 that the CPU has."""
    dtype: str
    """The number type of all rows: `core.config.base.native_dtype`."""
    gpu: str | None


def describe() -> Machine:
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    words = set(cpuinfo.split())
    return {
        "cpu": name or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "matrix_instructions": [word for word in ("avx512_bf16", "amx_bf16", "bf16") if word in words],
        "dtype": native_dtype(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def in_words(machine: Machine) -> str:
    """One phrase for a table."""
    if machine["gpu"]:
        return f"{machine['gpu']}, {machine['dtype']}"
    instructions = ", ".join(machine["matrix_instructions"]) or "no bfloat16 instructions"
    return f"{machine['cpu']}, {machine['cores']} cores, {instructions}, {machine['dtype']}"


def commit() -> str:
    """Of this checkout, with + where files differ from it; empty outside a git repository."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    head = git("rev-parse", "--short=10", "HEAD")
    if head.returncode:
        return ""
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")


class OthersShare:
    """The share of the machine's CPU time that processes other than this one and its descendants use.

    Linux only; elsewhere it is unknown.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._started = time.monotonic()
        self._busy = _busy_ticks()
        self._base = self._own()

    def note(self) -> None:
        """Remember the CPU time of descendants; call it before they end."""
        self._own()

    def share(self) -> float | None:
        """From 0 to 1, since construction."""
        busy, own = _busy_ticks(), self._own()
        if busy is None or self._busy is None:
            return None
        wall = (time.monotonic() - self._started) * TICKS * (os.cpu_count() or 1)
        return round(min(1.0, max(0.0, (busy - self._busy - (own - self._base)) / max(wall, 1.0))), 3)

    def _own(self) -> int:
        """Ticks of this process and of all descendants that were ever seen."""
        for pid, ticks in _descendants(os.getpid()):
            self._known[pid] = max(ticks, self._known.get(pid, 0))
        return sum(self._known.values())


def _busy_ticks() -> int | None:
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    return user + nice + system + irq + softirq + steal


def _descendants(root: int) -> Iterator[tuple[int, int]]:
    """(process id, ticks of user and system time) of a process and all below it."""
    processes: dict[int, tuple[int, int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        processes[int(stat.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    inside = {root}
    while more := {pid for pid, (parent, _) in processes.items() if parent in inside and pid not in inside}:
        inside |= more
    yield from ((pid, processes[pid][1]) for pid in inside if pid in processes)
