"""Cases in which the machine refuses: a full disk, no permission, a clock that is moved back."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import stat
from functools import partial
from pathlib import Path

from core.artefacts import read_manifest
from core.reporting.crash import FULL
from experiments.drill.bench import LIMIT, Bench, before, run_to_end
from experiments.drill.damaged import is_result
from experiments.drill.models import NAME
from experiments.drill.outcome import CONTINUED, REFUSED, Failure, Outcome, go_on, note, refused, tail, went_well, whole
from experiments.drill.processes import without_override
from pipelines.stages import ALWAYS as STAGES

MIB = 2**20
MNT_DETACH = 2
MS_REMOUNT = 32
CLOCK = '''"""For a drill: the clock is set back by {back} seconds once it has been read {reads} times."""
import time
_real, _left, _format = time.time, [{reads}], time.strftime


def _now():
    _left[0] -= 1
    return _real() - ({back} if _left[0] < 0 else 0)


time.time = _now
time.time_ns = lambda: int(_now() * 1e9)
time.strftime = lambda text, *at: _format(text, *(at or (time.localtime(_now()),)))
'''


def full_disk(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """The run lies on a disk that is full before the stage ends; then there is space, and the same command goes on."""
    size = sum(p.stat().st_size for p in (bench.run / stage).rglob("*") if p.is_file())
    room = int(size * rng.uniform(0.02, 1.1))
    runs, log = place / "disk", place / "log"
    runs.mkdir()
    if not mount(runs, "size=1g"):
        return _file_limit(bench, stage, place, room)
    try:
        bench.copy(runs, before(stage))
        used = os.statvfs(runs)
        mount(runs, f"size={(used.f_blocks - used.f_bfree) * used.f_frsize + room}", again=True)
        what = note(place, f"{room // 1024} KiB are left on the disk, a tmpfs, for {size // 1024} KiB")
        ended = run_to_end(bench.words(stage, runs), log, LIMIT)
        if ended.status:
            refused(ended, [FULL], advice=None)
            whole(bench, runs / NAME, without=stage)
        mount(runs, "size=1g", again=True)
        tries = 1 + go_on(bench, stage, runs, log)
    finally:
        ctypes.CDLL(None).umount2(str(runs).encode(), MNT_DETACH)
    return Outcome(stage, what, tries, REFUSED if ended.status else CONTINUED)


def mount(folder: Path, options: str, *, again: bool = False) -> bool:
    """Mount a tmpfs, or change one; False where that is not permitted."""
    mounted = ctypes.CDLL(None).mount(b"tmpfs", str(folder).encode(), b"tmpfs", MS_REMOUNT if again else 0,
                                      options.encode())  # fmt: skip
    return mounted == 0


def _file_limit(bench: Bench, stage: str, place: Path, room: int) -> Outcome:
    """Where nothing can be mounted: no file may become larger than some bytes (RLIMIT_FSIZE)."""
    bench.copy(place, before(stage))
    what = note(place, f"no file may be larger than {room // 1024} KiB (RLIMIT_FSIZE)")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    ended = run_to_end(bench.words(stage, place), place / "log", LIMIT, setup=limit)
    if ended.status:
        refused(ended, ["File too large", FULL], advice=None)
    tries = 1 + go_on(bench, stage, place, place / "log")
    return Outcome(stage, what, tries, REFUSED if ended.status else CONTINUED)


def permission(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """A folder may not be written, or a file may not be read; root is without its capability to do so all the same."""
    run = bench.copy(place, before(stage))
    inputs = [p for s in STAGES[stage].inputs for p in (run / s).rglob("*") if p.is_file() and p.suffix != ".md"]
    cases: dict[str, tuple[Path, int]] = {"the run's folder is read-only": (run, 0o555)}
    (run / f"{stage}.partial").mkdir()
    cases["the folder of unfinished work is read-only"] = (run / f"{stage}.partial", 0o555)
    if inputs:
        file = rng.choice([p for p in inputs if p.suffix != ".pt" and "tensorboard" not in p.parts])
        cases["an input is not readable"] = (file, 0)
        cases["a folder of an input is not readable"] = (file.parent, 0)
    how = rng.choice(sorted(cases))
    path, mode = cases[how]
    if how != "the folder of unfinished work is read-only":
        (run / f"{stage}.partial").rmdir()
    what = note(place, f"{how}: {path.relative_to(place)}")
    before_mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    ended = run_to_end(bench.words(stage, place), place / "log", LIMIT, setup=without_override)
    if path.exists():  # unfinished work that cannot be used is begun anew, where its own folder lies may be written
        path.chmod(before_mode)
    anew = not ended.status and path.name == f"{stage}.partial"
    needless = path.is_file() and not is_result(str(path.relative_to(run / path.relative_to(run).parts[0])))
    unread = not ended.status and (needless or not STAGES[stage].opens_weights and path.suffix == ".safetensors")
    if not unread and not anew:
        refused(ended, [path.name, f"{stage}.partial"], advice=None)
    whole(bench, run, without=stage)
    tries = 1
    if stage in ("prompts", "report"):
        tries += go_on(bench, stage, place, place / "log")
    return Outcome(stage, what, tries, CONTINUED if unread or anew else REFUSED)


def reader_permission(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """Whoever may not write a finished run can still look at it."""
    run = bench.copy(place)
    for path in [*run.rglob("*"), run]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for words in (bench.words(stage, place), ["status", *bench.options(place)], ["verify", str(run)]):
            went_well(run_to_end(words, place / "log", setup=without_override))
    finally:
        for path in [run, *run.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    whole(bench, run)
    return Outcome(stage, "a finished run may only be read", 3, CONTINUED)


def clock(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """The clock is set back while a stage runs."""
    back, reads = rng.choice((3600, 86400, 10**9)), rng.choice((3, 10, 30, 100))
    folder = place / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK.format(back=back, reads=reads))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    bench.copy(place, before(stage))
    what = note(place, f"set back by {back} s at its {reads}th reading")
    ended = run_to_end(bench.words(stage, place), place / "log", env={"PYTHONPATH": path})
    went_well(ended)
    tries = 1 + go_on(bench, stage, place, place / "log")  # is up to date
    seconds = (read_manifest(place / NAME / stage) or {})["seconds"]
    if seconds < 0:
        raise Failure(f"the manifest of {stage} says that it took {seconds} seconds")
    return Outcome(stage, what, tries, CONTINUED)


def file_times(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """The times of all files are others: what is up to date does not depend on them."""
    run = bench.copy(place)
    for file in run.rglob("*"):
        os.utime(file, (when := rng.randrange(1, 2**32), when))
    for words in (bench.words(stage, place), ["status", *bench.options(place)]):
        ended = run_to_end(words, place / "log")
        went_well(ended)
        if "up to date" not in ended.said or "stale" in ended.said or "damaged" in ended.said:
            raise Failure(f"{ended.words}, with other times of files: {tail(ended.said)}")
    whole(bench, run)
    return Outcome(stage, "files have times from 1970 to 2106", 2, CONTINUED)
