"""One writer of a stage at a time: a lock that ends with the processes that hold it.

The lock is the operating system's (`flock`) on a file in the run's folder. Ranks inherit it, so that it is held for as
long as any process of a command works, even where the command itself was killed. The file says who holds it. Where two
machines share a file system but not its locks, that text is the lock: a holder on another host is believed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from core.damage import OWN
from core.errors import Busy


class Holder(NamedTuple):
    host: str
    pid: int
    started: int
    """When the process began, in clock ticks since the machine started: another process may get the same pid."""
    since: str
    """When it took the lock."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether the process, which must be of this host, still runs."""
        return self.started != 0 and start_of(self.pid) == self.started


_held: dict[Path, int] = {}
"""Locks that this process holds, with their descriptors."""


def descriptors() -> tuple[int, ...]:
    """Of the locks that this process holds: its ranks must inherit them."""
    return tuple(_held.values())


@contextmanager
def writing(run: Path, stage: str) -> Iterator[None]:
    """Hold the lock of a stage of a run; a process that holds it may call this again.

    Raises:
        Busy: another process holds it; names it. Also for one on another host that has left its name.
    """
    file = run.resolve() / OWN / f"{stage}.lock"
    if file in _held:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, file, stage)
        _held[file] = descriptor
        try:
            yield
        finally:
            del _held[file]
            os.ftruncate(descriptor, 0)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # of processes that linger, too
    finally:
        os.close(descriptor)


def _take(descriptor: int, file: Path, stage: str) -> None:
    can_lock = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise Busy(_who(_holder(descriptor), stage, file)) from None
        can_lock = False  # a file system without locks
    if (holder := _holder(descriptor)) and (not holder.is_here() or (not can_lock and holder.is_alive())):
        raise Busy(_who(holder, stage, file))
    me = Holder(socket.gethostname(), os.getpid(), start_of(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(me._asdict()).encode() + b"\n", 0)


def _who(holder: Holder | None, stage: str, file: Path) -> str:
    if holder is None:
        return f"{stage} is being written by another process ({file} is locked): wait for it, or give this run a name"
    if not holder.is_here():
        return f"{stage} is being written by {holder}: wait for it. If it has ended there, delete {file}"
    if not holder.is_alive():
        return f"{stage} was being written by {holder}, which has ended; its ranks still end: try again in a minute"
    return f"{stage} is being written by {holder}: wait for it, stop it, or give this run another run.name"


def _holder(descriptor: int) -> Holder | None:
    """Who the file names; None where it names nobody, or is half written."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def start_of(pid: int) -> int:
    """When a process of this host began, in clock ticks since the machine started; 0 where there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else 0


def state_of(pid: int) -> str:
    """As in proc(5): R or S, T for one that is stopped, Z for one that has ended; empty where there is none."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name of the program."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
