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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from core.locks import descriptors

LAUNCHER = "GRM_LAUNCHER"
"""Environment variable of a rank: the process that started it."""
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
GRACE_SECONDS = 30
"""What the other ranks have to end by themselves where one has failed."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Asked:
    """What signals have asked of the ranks: the first one to stop, a second SIGINT to end at once."""

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


def run_ranks(command: Sequence[str], environment: Mapping[str, str], ranks: int, *, stop_seconds: float) -> int:
    """Run `command` once for each rank, with its place in the variables that torch.distributed reads.

    SIGTERM is passed on to all ranks, and SIGINT as SIGTERM; a second SIGINT kills them. Where one of them fails, the
    others are ended. The ranks themselves get no SIGINT from the terminal.

    Args:
        environment: of all ranks.
        stop_seconds: how long ranks may take to end after SIGTERM before they are killed.

    Returns:
        The exit status of a rank that failed, negative for a signal; 0 if all went well.
    """
    port = free_port()
    shared = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), LAUNCHER: str(os.getpid())}
    asked = _Asked()
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    running, locks = asked.running, descriptors()
    try:
        with _held_back(signal.SIGINT):
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.append(subprocess.Popen(command, env={**shared, **place}, pass_fds=locks))
        if asked.first:  # while they were started
            end(running)
        while None in (ended := [process.poll() for process in running]) and not any(ended):
            if asked.seconds() > stop_seconds:
                return -signal.SIGKILL
            asked.tell()
            time.sleep(0.05)
        if asked.first:  # the others end too, each after its own step
            wait(running, stop_seconds)
        failed = next((status for status in ended if status), 0)
        return -asked.first if failed == -signal.SIGTERM and asked.first else failed
    finally:
        end(running)
        wait(running, GRACE_SECONDS)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _held_back(number: int) -> Iterator[None]:
    """A signal waits until the end, and processes that are started meanwhile never get it.

    Python would answer SIGINT with a traceback while it starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_launcher() -> None:
    """Let this rank get SIGTERM when the process that started it ends in any way, `kill -9` included.

    Without it the ranks of a command that was killed go on, and write where the next command does.
    """
    launcher = os.environ.get(LAUNCHER)
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
