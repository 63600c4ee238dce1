"""Policies of a study that are trained at the same time, each on its own share of the machine.

Policies do not depend on each other, so their processes wait neither for each other nor for the parts of a step that
use one core. With several GPUs each policy has its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.environment import visible_gpus
from core.ranks import PARENT, Asked, asked_to_stop, end, held_back, wait
from pipelines.launch import STOP_SECONDS

LOG = "output.txt"
"""What the stages of a policy print, in its folder."""
SHOWN_LINES = 15
"""Of a log, where its stage has failed."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several policies may use of this machine."""

    cores: frozenset[int]
    variables: Mapping[str, str]
    """That show it its GPUs alone."""


@dataclass(frozen=True, slots=True)
class Training:
    """A policy whose stages run one after the other."""

    name: str
    folder: Path
    stages: Sequence[Sequence[str]]
    """Arguments of `grm` for each."""

    def log(self) -> Path:
        return self.folder / LOG


@dataclass(frozen=True, slots=True)
class Running:
    """A stage of a policy that runs."""

    training: Training
    number: int
    """Of the stage among those of the policy."""
    share: Share
    process: subprocess.Popen
    began: float

    @property
    def stage(self) -> str:
        return self.training.stages[self.number][0]

    def is_last(self) -> bool:
        return self.number + 1 == len(self.training.stages)


def parts_of(at_once: int, gpus: int, cores: int) -> int:
    """How many policies are trained at the same time: no more than there are GPUs, or without GPUs cores."""
    return min(at_once, gpus or cores)


def shares(at_once: int) -> list[Share]:
    """The machine in equal parts, one for each policy that is trained at the same time."""
    cores, gpus = sorted(os.sched_getaffinity(0)), visible_gpus()
    parts = parts_of(at_once, len(gpus), len(cores))
    each = max(1, len(cores) // parts)
    own = [frozenset(cores[i * each : (i + 1) * each]) or frozenset(cores) for i in range(parts)]
    if not gpus:
        return [Share(part, {}) for part in own]
    each = len(gpus) // parts
    return [Share(p, {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])}) for i, p in enumerate(own)]


def run_at_once(trainings: Sequence[Training], parts: Sequence[Share]) -> int:
    """Train policies, as many at a time as there are parts of the machine.

    What they print goes to `output.txt` in the folder of each. Where one fails, the others that run go on to the end of
    their stage, and no more is begun. SIGTERM and Ctrl-C are passed on: each policy saves its step.

    Returns:
        0, or the exit status of a stage that failed or was stopped.
    """
    left, free, running, status = list(trainings), list(parts), list[Running](), 0
    with tqdm(total=len(left), desc="policies", unit="policy") as bar, asked_to_stop() as asked:
        try:
            while running or (left and not status and not asked.first):
                while left and free and not status and not asked.first:
                    running.append(_start(left.pop(0), 0, free.pop(0), asked))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    status = _ended(one, stopping=bool(asked.first)) or status
                    if status or asked.first or one.is_last():
                        free.append(one.share)
                        bar.update(not status and one.is_last())
                    else:
                        running.append(_start(one.training, one.number + 1, one.share, asked))
                if asked.seconds() > STOP_SECONDS:
                    break
                asked.tell()
                time.sleep(0.2)
        finally:
            end(asked.running)
            wait(asked.running, STOP_SECONDS)
    return 128 + asked.first if asked.first else status


def _start(training: Training, number: int, share: Share, asked: Asked) -> Running:
    """Start a stage of a policy on a share of the machine."""
    training.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **share.variables, PARENT: str(os.getpid())}
    command = [sys.executable, "-u", "-m", "pipelines", *training.stages[number]]
    with _on(share.cores), held_back(), training.log().open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    asked.running.append(process)
    if asked.first:  # while it was started
        process.terminate()
    return Running(training, number, share, process, time.monotonic())


def _ended(one: Running, *, stopping: bool) -> int:
    """Say how a stage has ended; its exit status."""
    status, name, log = one.process.returncode, f"{one.training.name}: {one.stage}", one.training.log()
    if not status:
        tqdm.write(f"{name} took {time.monotonic() - one.began:.0f} s", file=sys.stderr)
        return 0
    if stopping:
        tqdm.write(f"{name} stopped", file=sys.stderr)
    else:
        lines = [line.rsplit("\r", 1)[-1] for line in log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]]
        tqdm.write("\n  ".join([f"{name} failed; the end of {log}:", *lines]), file=sys.stderr)
    return status if status > 0 else 128 - status


@contextmanager
def _on(cores: frozenset[int]) -> Iterator[None]:
    """Processes that are started meanwhile run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
