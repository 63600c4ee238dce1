"""How tests start make, programs and servers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from core.environment import variables

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str, timeout: int = 1800) -> subprocess.CompletedProcess:
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def run_program(*arguments: object, ranks: int | None = None, timeout: int = 600) -> str:
    """Run `python ARGUMENTS` (under torchrun with `ranks`) in the environment of a stage; stdout, or a failed test."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables(ranks or 1), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
