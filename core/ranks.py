"""Processes that share one machine, one per rank: what torchrun does there, without the seconds that it takes itself.

Many machines need torchrun, which finds the others (docs/scale.md).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from core.errors import EXIT_LOST, DataError
from core.locks import descriptors, state_of

if TYPE_CHECKING:
    from torch.distributed import Store

LAUNCHER = "GRM_LAUNCHER"
"""Environment variable of a rank that `grm` started: the process that did."""
AGENT = "GRM_AGENT"
"""Environment variable of a rank that torchrun started: the agent that did."""
PARENT = "GRM_PARENT"
"""Environment variable of a stage that another command of `grm` started as a program of its own: that command."""
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
GRACE_SECONDS = 30
"""What the other ranks have to end by themselves where one has failed."""
LONGEST_WAIT = timedelta(days=7)
"""Of a rank for another one: whoever started them ends all where one has failed."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Asked:
    """What signals have asked of processes: the first one to stop, a second SIGINT to end at once."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen] = []
        self.since: float | None = None
        """When the first signal came, in seconds of the monotonic clock."""
        self.first = 0
        self.told = False

    def __call__(self, number: int, _: object) -> None:
        if self.first == number == signal.SIGINT:
            for process in self.running:
                process.kill()
        if self.since is None:
            self.since, self.first = time.monotonic(), number
        end(self.running)

    def seconds(self) -> float:
        return 0.0 if self.since is None else time.monotonic() - self.since

    def tell(self) -> None:
        """After Ctrl-C, say once why nothing seems to happen."""
        if self.first == signal.SIGINT and not self.told and self.seconds() > 1:
            self.told = True
            print("stops after the current step; Ctrl-C once more ends it at once", file=sys.stderr, flush=True)


def place() -> tuple[int, int]:
    """(number of this process from 0, how many work together), as `grm` or torchrun started it; else (0, 1)."""
    if LAUNCHER not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1  # such variables are also set for other programs, on clusters
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def told_by_first(subject: str, tell: Callable[[], str] = str) -> str:
    """What the first rank says on a subject, on every rank: it calls `tell`, and the others wait for the answer.

    Every rank must call it, once for each subject. It returns when all ranks know the answer. It needs no process
    group, which would be that of vLLM and DeepSpeed too.

    Raises:
        DataError: on the others, where the first rank has ended without an answer.
    """
    rank, ranks = place()
    if ranks == 1:
        return tell()
    from torch.distributed import DistError

    store, everyone = _store(), f"{subject}: heard by all"
    if rank == 0:
        said = tell()
        store.set(subject, said)
        store.wait([everyone], LONGEST_WAIT)  # the store ends with this process
        return said
    try:
        said = store.get(subject).decode()
        if store.add(f"{subject}: heard", 1) == ranks - 1:
            store.set(everyone, "")
    except DistError:
        time.sleep(GRACE_SECONDS)  # whoever started the ranks ends this one too; the first has said what is wrong
        raise DataError("the first rank has ended") from None
    return said


@cache
def _store() -> Store:
    """The ranks' common store, which is in the first rank, or in torchrun."""
    from torch.distributed import rendezvous

    return next(iter(rendezvous("env://", timeout=LONGEST_WAIT)))[0]


def run_ranks(
    command: Sequence[str], environment: Mapping[str, str], ranks: int, *, stop_seconds: float,
    own: Callable[[int], Mapping[str, str]] = lambda rank: {},
    failed: Callable[[int], None] = lambda rank: None,
) -> int:  # fmt: skip
    """Run `command` once for each rank, with its place in the variables that torch.distributed reads.

    SIGTERM is passed on to all ranks, and SIGINT as SIGTERM; a second SIGINT kills them. Where one of them fails, the
    others are ended. The ranks themselves get no SIGINT from the terminal.

    Args:
        environment: of all ranks.
        stop_seconds: how long ranks may take to end after SIGTERM before they are killed.
        own: further variables of a rank by its number.
        failed: called with the number of the rank whose status is returned, if it is not 0.

    Returns:
        The exit status of a rank that failed, negative for a signal; 0 if all went well.
    """
    port = free_port()
    shared = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), LAUNCHER: str(os.getpid())}
    with asked_to_stop() as asked:
        return _run_ranks(command, shared, ranks, asked, stop_seconds, own, failed)


def _run_ranks(
    command: Sequence[str], shared: Mapping[str, str], ranks: int, asked: Asked, stop_seconds: float,
    own: Callable[[int], Mapping[str, str]], failed: Callable[[int], None],
) -> int:  # fmt: skip
    running, locks = asked.running, descriptors()
    try:
        with held_back():
            for rank in range(ranks):
                numbered = {"RANK": str(rank), "LOCAL_RANK": str(rank), **own(rank)}
                running.append(subprocess.Popen(command, env={**shared, **numbered}, pass_fds=locks))
        if asked.first:  # while they were started
            end(running)
        while None in (ended := [process.poll() for process in running]) and not any(ended):
            if asked.seconds() > stop_seconds:
                return -signal.SIGKILL
            asked.tell()
            time.sleep(0.05)
        if asked.first:  # the others end too, each after its own step
            wait(running, stop_seconds)
        # Those that ended because another was lost are not the fault.
        statuses = {rank: status for rank, status in enumerate(ended) if status}
        fault = next((rank for rank, status in statuses.items() if status != EXIT_LOST), next(iter(statuses), None))
        if fault is None:
            return 0
        failed(fault)
        return -asked.first if statuses[fault] == -signal.SIGTERM and asked.first else statuses[fault]
    finally:
        end(running)
        for process in running:
            if state_of(process.pid) == "T":  # by SIGSTOP or a debugger: it gets no other signal
                process.kill()
        wait(running, GRACE_SECONDS)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """SIGTERM and SIGINT are meanwhile passed on to the processes in `Asked.running`."""
    asked = Asked()
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """SIGINT waits until the end, and processes that are started meanwhile never get it.

    Python would answer it with a traceback while it starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_launcher() -> None:
    """Let this process get SIGTERM when `grm` or torchrun, which started it, ends in any way, `kill -9` included.

    Without it the ranks of a command that was killed go on, and write where the next command does.
    """
    launcher = os.environ.get(LAUNCHER) or os.environ.get(AGENT) or os.environ.get(PARENT)
    if launcher is None or not hasattr(ctypes.CDLL(None), "prctl"):
        return
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it had ended before
        os.kill(os.getpid(), signal.SIGTERM)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM to those that still run."""
    for process in processes:
        if process.poll() is None:
            process.terminate()


def wait(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    """Return when all have ended, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
