"""How tests start make, programs and servers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from core.environment import variables
from core.http import ask_json

ROOT = Path(__file__).resolve().parents[2]
GRM = (sys.executable, "-m", "pipelines")
SEED = int(os.environ.get("RLHF_TEST_SEED", "0"))
"""Of what tests draw at random, such as the moment of a kill; in the header of every test report."""
START_RANKS = (
    "import os, sys; from core.ranks import run_ranks; "
    "sys.exit(run_ranks([sys.executable, *sys.argv[2:]], os.environ, int(sys.argv[1]), stop_seconds=1))"
)
_MARK = "RLHF_TEST_PROCESS"
"""Environment variable by which processes are found that a test started, and those that these started."""


def make(*arguments: str, timeout: int = 1800) -> subprocess.CompletedProcess:
    """Run `make ARGUMENTS`, as from a shell: `make test` hands its own options on to every make that it starts."""
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def run_program(*arguments: object, ranks: int | None = None, timeout: int = 600, **environment: str) -> str:
    """Run `python ARGUMENTS`, or as many of it as `ranks`, in the environment of a stage; stdout, or a failed test.

    Args:
        environment: more of it.
    """
    launcher = ["-c", START_RANKS, str(ranks)] if ranks else []
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables(ranks or 1), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def draw(name: str, low: float, high: float) -> float:
    """A number between the two that depends on `SEED` and the name alone."""
    number = random.Random(f"{SEED} {name}").uniform(low, high)
    print(f"RLHF_TEST_SEED={SEED}: {name} is {number:.1f}")
    return number


@contextmanager
def background(*command: object, log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A process whose output is added to `log`. At the end of the block it is killed, with all that it started."""
    mark = uuid.uuid4().hex
    with log.open("a") as file:
        process = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env={**os.environ, **(env or {}), _MARK: mark}, stdout=file, stderr=file
        )
    try:
        yield process
    except BaseException:
        print(f"the end of {log}:", log.read_text()[-4000:], sep="\n")
        raise
    finally:
        while running := _marked(mark):  # what is started meanwhile is found at the next look
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        process.wait()


def _marked(mark: str) -> list[int]:
    """Running processes that inherited the mark; torchrun puts its ranks into sessions of their own."""
    found, wanted = [], f"{_MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return found


def wait_for(holds: Callable[[], object], process: subprocess.Popen, seconds: float = 400) -> None:
    """Return once `holds()` is true; a failed test if the process ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, f"ended with status {process.returncode} before what the test waits for"
        assert time.monotonic() < deadline, f"not within {seconds:.0f} seconds"
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        ask_json(url, None, 5)
    except OSError:
        return False
    return True
