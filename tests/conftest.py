"""Shared by the tests: where the real models are, and how to start a program as the stages are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POLICY = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def policy_path() -> Path:
    if not (POLICY / "model.safetensors").is_file():
        pytest.skip(f"no {POLICY.relative_to(ROOT)}: run `make setup`")
    return POLICY


def run_program(*arguments: object, ranks: int | None = None, timeout: int = 600) -> str:
    """Run `python ARGUMENTS` (under torchrun with `ranks`) in the environment of a stage; stdout, or a failed test."""
    from pipelines.launch import environment

    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment(ranks or 1), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
