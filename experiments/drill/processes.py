"""Commands of a drill: started in a session of their own, with a time limit, and ended with all that they started."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MARK = "GRM_DRILL"
"""Environment variable by which the processes of a command are found, whoever their parents are by then."""
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
HUNG = -1
"""In place of an exit status: not ended within the time limit."""


class Ended(NamedTuple):
    words: str
    """The command, for people."""
    status: int
    said: str
    """Standard output and standard error together."""


class Command:
    """`grm WORDS`, running.

    Args:
        log: where its output goes; overwritten.
        setup: called in the new process before `grm` starts.
    """

    def __init__(
        self, words: Sequence[object], log: Path, *, env: Mapping[str, str] | None = None,
        setup: Callable[[], None] | None = None,
    ):  # fmt: skip
        self.words, self.log, self._mark = [str(w) for w in words], log, uuid.uuid4().hex
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *self.words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, env={**os.environ, **(env or {}), MARK: self._mark}, start_new_session=True,
                preexec_fn=partial(_prepared, setup),  # noqa: PLW1509, the drill has no threads
            )  # fmt: skip
        self._seconds, self._seen = 0.0, time.monotonic()
        _started.append(self)

    def running(self) -> bool:
        return self.process.poll() is None

    def seconds(self) -> float:
        """Since it started, as far as it was watched: while the drill itself is stopped, no time goes by."""
        now = time.monotonic()
        self._seconds, self._seen = self._seconds + min(1.0, now - self._seen), now
        return self._seconds

    def pids(self) -> list[int]:
        """Running processes of the command, itself included."""
        found, wanted = [], f"{MARK}={self._mark}".encode()
        for folder in Path("/proc").iterdir():
            with suppress(OSError):  # ended meanwhile
                if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def processor_seconds(self) -> float:
        """Of its running processes, and of those that have ended and were waited for."""
        ticks = 0
        for pid in self.pids():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def foreground(self) -> list[int]:
        """The process group that a terminal sends Ctrl-C to."""
        return [pid for pid in self.pids() if _group(pid) == self.process.pid]

    def signal(self, number: int, pids: Sequence[int] | None = None) -> None:
        """Send a signal to these processes; None: to `grm` itself."""
        for pid in [self.process.pid] if pids is None else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, limit: float) -> Ended:
        """Wait until it has ended, at most `limit` seconds from its start; then whatever is left of it is killed."""
        while self.running() and self.seconds() < limit:
            time.sleep(0.02)
        status = self.process.poll()
        if status is None:
            self.kill_all()
            status = HUNG
        elif status < 0:
            status = 128 - status
        return Ended("grm " + " ".join(self.words), status, self.log.read_text(errors="replace"))

    def kill_all(self) -> None:
        """SIGKILL to every process of the command, and to those that they start meanwhile."""
        while running := self.pids():
            self.signal(signal.SIGKILL, running)
            time.sleep(0.05)
        self.process.wait()


_started: list[Command] = []


def end_all() -> None:
    """Kill what is left of all commands that were started since the last call."""
    while _started:
        _started.pop().kill_all()


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _prepared(setup: Callable[[], None] | None) -> None:
    """Ctrl-C has its usual effect, which a shell takes from what it starts in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if setup:
        setup()


def without_override() -> None:
    """Let root be refused by the permissions of files, as other users are."""
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
