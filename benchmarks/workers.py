"""The runner's end of the pipes: a process for each side of a row, kept alive between its timed runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

from core.environment import variables

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 1800.0
"""Seconds that a worker has for one answer."""


def shown(path: str | Path) -> str:
    """A path for the record: within the checkout, where it lies there."""
    path = Path(path)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class WorkerError(Exception):
    """A worker did not start, failed or took too long; the text says which, with the end of its output."""


class Program(NamedTuple):
    """How one side of a row is started."""

    script: str
    """A module of this project, as `benchmarks.ours.ppo`, or a file, which runs in any environment."""
    python: str = sys.executable
    ranks: int = 1

    def command(self) -> list[str]:
        start = ["-m", self.script] if not self.script.endswith(".py") else [str(ROOT / self.script)]
        if self.ranks == 1:
            return [self.python, *start]
        return [self.python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", *start]


class Worker:
    """A running program that has been given its job and has prepared it.

    Args:
        log: file for what it prints.

    Attributes:
        about: what it says of itself: versions and settings.

    Raises:
        WorkerError: it did not start.
    """

    def __init__(self, program: Program, job: Mapping[str, Any], log: Path):
        self._log, self._name = log, program.script
        log.parent.mkdir(parents=True, exist_ok=True)
        if not Path(program.python).is_file():
            raise WorkerError(f"no {shown(program.python)}: `make bench PEERS=1` makes the peers' environments")
        # Both sides get the threads and the allocator of a stage, which is the faster setting for both.
        environment = {**os.environ, **variables(program.ranks)}
        if program.python == sys.executable:
            environment["PYTHONPATH"] = str(ROOT)
        else:
            environment.pop("PYTHONPATH", None)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                program.command(), cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=output, text=True, start_new_session=True,
            )  # fmt: skip
        try:
            self.about: dict[str, Any] = self._ask(job)["about"]
        except BaseException:
            self.close()
            raise

    def run(self) -> tuple[float, float]:
        """Seconds of one timed run, and its work in the unit of the row."""
        answer = self._ask({"do": "run"})
        return answer["seconds"], answer["work"]

    def check(self) -> Any:
        """Its results, to compare with those of the other side."""
        return self._ask({"do": "check"})["result"]

    def close(self) -> None:
        """End the process and what it started."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # it may be in the middle of a long run
            self._kill()
        self.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        timer = Timer(PATIENCE, self._kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(f"{self._name} failed: {self._last_words()} (all of its output: {shown(self._log)})")
        return json.loads(line)

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)  # torchrun passes it on to its ranks

    def _last_words(self) -> str:
        """The last line of its output that is an error, or the last line."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return (errors or lines or ["it said nothing"])[-1][:300]
