"""Processes that share one machine, one per rank: what torchrun does there, without the seconds that it takes itself.

Many machines need torchrun, which finds the others (docs/scale.md).
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence

GRACE_SECONDS = 30
"""What the other ranks have to end by themselves where one has failed."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(command: Sequence[str], environment: Mapping[str, str], ranks: int, *, stop_seconds: float) -> int:
    """Run `command` once for each rank, with its place in the variables that torch.distributed reads.

    SIGTERM is passed on to all ranks. Where one of them fails, the others are ended.

    Args:
        environment: of all ranks.
        stop_seconds: how long ranks may take to end after SIGTERM before they are killed.

    Returns:
        The exit status of a rank that failed, negative for a signal; 0 if all went well.
    """
    port = free_port()
    shared = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)
    ]
    asked: list[float] = []  # when SIGTERM came

    def stop(*_: object) -> None:
        asked.append(time.monotonic())
        end(running)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while None in (ended := [process.poll() for process in running]) and not any(ended):
            if asked and time.monotonic() - asked[0] > stop_seconds:
                return -signal.SIGKILL
            time.sleep(0.05)
        if asked:  # the others end too, each after its own step
            wait(running, stop_seconds)
        return next((status for status in ended if status), 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        end(running)
        wait(running, GRACE_SECONDS)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


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
