"""Where each rank of a stage is, in a file of its own, and what the others do when one of them is lost.

A rank that was killed closes its connections, and the others notice at once. One that hangs, or whose machine is gone,
leaves them waiting in a collective. So every rank writes its phase and, from a thread, that it is alive, into a folder
that all ranks see (that of the run). A rank that shows no sign of life for too long is named, and the others end.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from core.damage import OWN
from core.errors import EXIT_LOST
from core.locks import start_of

WORKING, WAITING, FAILED, ENDED = "working", "waiting", "failed", "ended"
"""What a rank says of itself. `WAITING`: it has noticed that another one is lost."""
BEATS = 8
"""Signs of life within the time after which a rank is given up."""
LONGEST_BEAT = 10.0
"""Seconds between signs of life, at most."""
FAILED_SECONDS = 30.0
"""After a rank has said that it failed: what the others have to notice it by their connections, before they end too."""
GATHER_SECONDS = 3.0
"""What ranks that lose a connection have to say so: those that do not are the lost ones."""
MARGIN_SECONDS = 60.0
"""What a collective gets beyond the time after which a rank is given up: who is silent is to be found first."""
CONTINUES = "the same command goes on from what is saved"


class Place(NamedTuple):
    phase: str
    step: int
    state: str
    job: str
    """Of which ranks it is one: files of an earlier command are not believed."""
    host: str
    pid: int
    started: int
    """Of the process, as in `core.locks.Holder`."""
    beat: int

    def __str__(self) -> str:
        return f"in phase {self.phase}" + (f" of step {self.step}" if self.step else "")

    def is_dead(self) -> bool:
        """Whether the process is of this host and has ended."""
        return self.host == socket.gethostname() and start_of(self.pid) != self.started


def folder_of(run: Path, stage: str) -> Path:
    """Where the ranks of a stage write."""
    return run / OWN / f"{stage}.ranks"


def read(folder: Path) -> dict[int, Place]:
    """The last word of each rank; a file that is being written, or is none, is passed over."""
    found = {}
    for file in folder.glob("*.json"):
        with suppress(OSError, ValueError, TypeError):
            found[int(file.stem)] = Place(**json.loads(file.read_bytes()))
    return found


def clear(folder: Path) -> None:
    """Forget the ranks of an earlier command."""
    shutil.rmtree(folder, ignore_errors=True)


class Whereabouts:
    """What one rank tells, and knows of the others.

    Args:
        folder: of all ranks of the stage.
        timeout: seconds without a sign of life after which a rank is given up.
        name: of this process in messages.
    """

    def __init__(self, folder: Path, *, rank: int, world: int, timeout: float, name: str):
        self.rank, self.world, self.timeout, self.name = rank, world, timeout, name
        self._folder, self._lock = folder, threading.Lock()
        job = "/".join(os.environ.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))
        pid = os.getpid()
        self._place = Place("start", 0, WORKING, job, socket.gethostname(), pid, start_of(pid), 0)
        self._seen: dict[int, tuple[tuple[int, str], float]] = {}

    def start(self) -> None:
        """Begin to give signs of life, and to look for those of the others."""
        self.tell()
        if self.world > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, **changes: Any) -> None:
        """Write where this rank is now."""
        with self._lock:
            self._place = self._place._replace(**changes)
            file = self._folder / f"{self.rank}.json"
            with suppress(OSError):  # a full disk stops the stage where it writes its results
                self._folder.mkdir(parents=True, exist_ok=True)
                file.with_suffix(".tmp").write_text(json.dumps(self._place._asdict()))
                os.replace(file.with_suffix(".tmp"), file)

    @property
    def state(self) -> str:
        return self._place.state

    def others(self) -> dict[int, Place | None]:
        """Where the other ranks are; None for one that has not said anything yet."""
        found = {rank: place for rank, place in read(self._folder).items() if place.job == self._place.job}
        return {rank: found.get(rank) for rank in range(self.world) if rank != self.rank}

    def silent(self, now: float) -> dict[int, Place | None]:
        """The ranks that have shown no sign of life for too long, or have failed; `now` are seconds of a clock.

        Clocks of other machines are not read: what counts is when this rank saw something new.
        """
        found = {}
        for rank, place in self.others().items():
            said = (place.beat, place.state) if place else (-1, WORKING)
            if self._seen.get(rank, (None, 0.0))[0] != said:
                self._seen[rank] = (said, now)
            limit = self.timeout if said[1] == WORKING else min(FAILED_SECONDS, self.timeout)
            if said[1] != ENDED and now - self._seen[rank][1] > limit:
                found[rank] = place
        return found

    def _watch(self) -> None:
        between, clock, last = min(LONGEST_BEAT, self.timeout / BEATS), 0.0, time.monotonic()
        while self.state == WORKING:
            time.sleep(between)
            self.tell(beat=self._place.beat + 1)
            # Where all ranks were stopped for a while, such as by Ctrl-Z, none has been silent.
            clock, last = clock + min(time.monotonic() - last, 2 * between), time.monotonic()
            if (lost := self.silent(clock)) and self.state == WORKING:
                self._give_up(lost)

    def _give_up(self, lost: Mapping[int, Place | None]) -> None:
        """End this process, which waits for ranks that do not come. The first rank that is left says why."""
        mine = self._place
        self.tell(state=WAITING)
        if self.rank == min(set(range(self.world)) - set(lost)):
            silent = any(place is None or place.state == WORKING for place in lost.values())
            why = f": no sign of life for {self.timeout:g} s (engine.rank_timeout)" if silent else ""
            said = f"{self.name}: {_named(lost)}{why}. This rank was {mine}. Ends; {CONTINUES}"
            print(f"\n{said}", file=sys.stderr)  # below a progress bar
        else:
            time.sleep(1)  # where a launcher ends all ranks with the first, it must not be this one
        sys.stderr.flush()
        os._exit(EXIT_LOST)

    def lost(self) -> dict[int, Place | None]:
        """After a collective has failed: the ranks because of which it did. Waits a little for what the others say."""
        self.tell(state=WAITING)
        deadline = time.monotonic() + GATHER_SECONDS
        while True:
            others = self.others()
            gone: dict[int, Place | None] = {
                r: p for r, p in others.items() if p and (p.state == FAILED or p.state == WORKING and p.is_dead())
            }
            rest = {r: p for r, p in others.items() if r not in gone and not (p and p.state in (WAITING, ENDED))}
            if gone or not rest or time.monotonic() > deadline:
                return gone or rest
            time.sleep(0.1)


def _named(lost: Mapping[int, Place | None]) -> str:
    """ "rank 1 on host b is lost in phase train of step 3" """
    words = []
    for rank, place in sorted(lost.items()):
        if place is None:
            words.append(f"rank {rank} has not begun")
            continue
        on = "" if place.host == socket.gethostname() else f" on {place.host}"
        how = "has failed" if place.state in (FAILED, WAITING) else "has ended" if place.is_dead() else "is lost"
        words.append(f"rank {rank}{on} {how} {place}")
    return ", ".join(words)


_mine: Whereabouts | None = None


def begin(folder: Path, *, rank: int, world: int, timeout: float, name: str) -> None:
    """Begin to tell where this rank is; the arguments are those of `Whereabouts`."""
    global _mine
    _mine = Whereabouts(folder, rank=rank, world=world, timeout=timeout, name=name)
    _mine.start()


def enter(phase: str, step: int = 0) -> None:
    """This rank begins a phase; nothing happens in a process that is no rank of a stage."""
    if _mine:
        _mine.tell(phase=phase, step=step)


def leave(*, well: bool) -> None:
    """This rank ends."""
    if _mine and _mine.state == WORKING:
        _mine.tell(state=ENDED if well else FAILED)


def timeout() -> float | None:
    """Seconds that a collective may take; None in a process that is no rank of a stage."""
    return _mine.timeout + MARGIN_SECONDS if _mine else None


def is_loss(error: BaseException | None) -> bool:
    """Whether a collective failed because of another rank, as gloo, NCCL and the store of torch say it."""
    while error is not None:
        if type(error).__name__.startswith("Dist") or "gloo/transport" in str(error) or "NCCL" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def loss(error: BaseException, *, launched: bool) -> str:
    """What to say of it; nothing where somebody else does.

    Args:
        launched: whether the process that started the ranks tells of those that have ended.
    """
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    if _mine is None or _mine.world == 1:
        return f"a connection between ranks failed: {said}"
    mine, lost = _mine._place, _mine.lost()
    if lost and launched and all(place and (place.state == FAILED or place.is_dead()) for place in lost.values()):
        return ""
    who = _named(lost) if lost else f"a connection between ranks failed ({said})"
    return f"{who}. This rank was {mine}. Ends; {CONTINUES}"
