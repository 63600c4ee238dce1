"""A worker's end of the pipes to the runner: one JSON object a line. Standard library alone, for every environment.

The first line from the runner is the job. The worker prepares it and answers with what it is (`about`). Then each
request is either {"do": "run"}, which is timed, or {"do": "check"}, which asks for results to compare. When the pipe
closes, the worker ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class Channel:
    """Reads the job on construction. From then on, whatever libraries print goes to standard error.

    Attributes:
        job: what the runner wants, as its row describes it.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        quieten()
        self.job: dict[str, Any] = self._read()

    def answer(self, **values: Any) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def wait_for_run(self, check: Callable[[], Any]) -> None:
        """Return when a timed run is requested; until then answer requests for results with `check()`."""
        while self._read()["do"] != "run":
            self.answer(result=check())

    def serve(self, run: Callable[[], float], check: Callable[[], Any], **about: Any) -> None:
        """Answer requests until the runner is done.

        Args:
            run: one run; returns how much work it was, in the unit of the row.
            check: the results to compare, as JSON.
            about: versions and settings, for the record.
        """
        self.answer(about=about)
        while True:
            self.wait_for_run(check)
            started = now()
            work = run()
            self.answer(seconds=now() - started, work=work)

    def _read(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        return json.loads(line)


def quieten() -> None:
    """Send what this process prints to standard error: nothing must get between the answers."""
    os.dup2(2, 1)


def now() -> float:
    """Seconds; a GPU has then done all that it was given."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those of `packages` that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
