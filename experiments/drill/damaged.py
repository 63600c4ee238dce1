"""Cases in which files are damaged: of finished stages, and of unfinished work."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

from core.artefacts import FINGERPRINT, MANIFEST, RESUME
from core.damage import LOOSE, WEIGHTS, matches
from experiments.drill.bench import Bench, run_to_end
from experiments.drill.breaking import HOWS, damage, pick
from experiments.drill.models import NAME, PROXY
from experiments.drill.outcome import (
    CONTINUED,
    REFUSED,
    Failure,
    Outcome,
    go_on,
    note,
    refused,
    same,
    sound,
    tail,
    went_well,
    whole,
)
from pipelines.stages import ALWAYS as STAGES

CHEAP = ("prompts", "report")
"""Stages that are made again with --force, as the message says, since that takes some seconds only."""
AGAIN = 0.25
"""Share of cases in which they are."""
EXIT_FOUND = 1
"""Of `grm verify` where files are damaged."""


def finished(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """A file of a finished stage is damaged; then the stage itself, a later one, an overview or a tool reads it."""
    folder = bench.copy(place) / stage
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    file, how = pick(files, rng), rng.choice(HOWS)
    later = [s for s in STAGES if stage in STAGES[s].inputs and {*STAGES[s].inputs} <= {*bench.stages}]
    ways = ["itself", "status", "verify", *(["later"] * 3 if later else []), *(["tool"] * 2 if stage == "rm" else [])]
    way = rng.choice(ways)
    if way == "itself" and file.name == MANIFEST and stage not in CHEAP:
        way = "verify"  # without a manifest the stage would run again
    what, changed = damage(file, [f for f in files if f != file and f.name != MANIFEST], how, rng)
    paths = [str(p.relative_to(folder)) for p in changed]
    names, harmful = [p.name for p in changed], [p for p in paths if is_result(p)]
    words: list[str] = {
        "itself": bench.words(stage, place), "status": ["status", *bench.options(place)],
        "verify": ["verify", str(place / NAME)], "tool": _tool(rng, folder, place),
        "later": bench.words(rng.choice(later or [stage]), place),
    }[way]  # fmt: skip
    what = note(place, f"{what} in {stage}; grm {words[0]}")
    if way == "later":
        return _later(bench, stage, words[0], place, what, names, harmful)
    if way == "tool":
        # It opens one model, and compares it with the manifest, if there is one.
        there = (folder / MANIFEST).is_file()
        harmful = [p for p in harmful if there and (Path(p).parts[0] == PROXY or p == MANIFEST)]
    if way == "itself" and MANIFEST in paths and not (folder / MANIFEST).is_file():
        return Outcome(stage, what, go_on(bench, stage, place, place / "log"), CONTINUED)
    again = stage in CHEAP and rng.random() < AGAIN
    return _told(bench, stage, place, what, names, words, unharmed=not harmful, again=again)


def is_result(path: str) -> bool:
    """Whether a file in a stage's folder is part of its result, or would be taken for it."""
    return path != FINGERPRINT and Path(path).parts[0] != RESUME and not matches(path, LOOSE)


def _tool(rng: random.Random, folder: Path, place: Path) -> list[str]:
    model = str(folder / PROXY)
    return rng.choice([
        ["rm-export", model, str(place / "exported")],
        ["rm-merge", str(place / "merged"), model, model],
    ])  # fmt: skip


def _told(
    bench: Bench, stage: str, place: Path, what: str, names: list[str], words: list[str], *, unharmed: bool, again: bool
) -> Outcome:
    """The command must tell of the damage, or go on where it concerns nobody; then the files are put back."""
    log = place / "log"
    ended = run_to_end(words, log)
    sound(ended)
    if unharmed:
        went_well(ended)
        return Outcome(stage, what, 1, CONTINUED)
    if words[0] == "status":
        line = next((x for x in ended.said.splitlines() if x.startswith(f"{stage} ")), "")
        if ended.status or not ("damaged" in line and any(n in line for n in names) or "not run" in line):
            raise Failure(f"grm status says of the damaged stage: {line!r}")
    else:
        refused(ended, names, status=EXIT_FOUND if words[0] == "verify" else 2)
    return Outcome(stage, what, 1 + _mended(bench, stage, place, log, again=again), REFUSED)


def _mended(bench: Bench, stage: str, place: Path, log: Path, *, again: bool) -> int:
    """Run the named command, or put the files back from a copy; the number of commands."""
    folder = place / NAME / stage
    if again:
        went_well(run_to_end([*bench.words(stage, place), "--force"], log))
        same(bench, stage, place)
        return 1
    shutil.rmtree(folder)
    shutil.copytree(bench.run / stage, folder)
    ended = run_to_end(bench.words(stage, place), log)
    went_well(ended)
    if "up to date" not in ended.said:
        raise Failure(f"{ended.words}, after its files were put back: {tail(ended.said)}")
    whole(bench, place / NAME)
    return 1


def _later(
    bench: Bench, stage: str, later: str, place: Path, what: str, names: list[str], harmful: list[str]
) -> Outcome:
    """A later stage must not start from the damaged file, unless it does not open it."""
    log = place / "log"
    shutil.rmtree(place / NAME / later, ignore_errors=True)
    if not STAGES[later].opens_weights:
        harmful = [p for p in harmful if not matches(p, WEIGHTS)]
    if harmful:
        refused(run_to_end(bench.words(later, place), log), [*names, repr(stage)])
        return Outcome(stage, what, 1, REFUSED)
    if later in CHEAP:
        went_well(run_to_end(bench.words(later, place), log))
        shutil.rmtree(place / NAME / stage)  # what it did not open is put back, and all else is compared
        shutil.copytree(bench.run / stage, place / NAME / stage)
        same(bench, later, place)
        return Outcome(stage, what, 1, CONTINUED)
    ended = run_to_end(["status", *bench.options(place)], log)  # the stage itself would take long
    went_well(ended)
    if "damaged" in ended.said:
        raise Failure(f"what is no result is called damaged: {tail(ended.said)}")
    return Outcome(stage, what, 1, CONTINUED)


def unfinished(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """A file that a stage had written when it was half done is damaged; then the stage is continued."""
    run, log = bench.copy_half(stage, place), place / "log"
    partial = run / f"{stage}.partial"
    files = [p for p in sorted(partial.rglob("*")) if p.is_file() and "tensorboard" not in p.parts]
    file = pick(files, rng)
    what, changed = damage(file, [f for f in files if f != file], rng.choice(HOWS[:6]), rng)
    names = [p.name for p in changed]
    what = note(place, f"{what} in {file.parent.relative_to(run)}")
    ended = run_to_end(bench.words(stage, place), log)
    sound(ended)
    if not ended.status:
        for path in changed:  # a stage publishes what else it finds
            if path.name.startswith(("copy-", "old-")):
                (run / stage / path.relative_to(partial)).unlink(missing_ok=True)
        same(bench, stage, place)
        return Outcome(stage, what, 1, CONTINUED)
    refused(ended, [*names, partial.name])
    if found := re.search(r"delete (/\S+?)(?: to|,|$)", ended.said, re.M):
        target = Path(found[1])
        if not target.is_relative_to(place):
            raise Failure(f"{ended.words} advises to delete {target}")
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        return Outcome(stage, what, 1 + go_on(bench, stage, place, log), REFUSED)
    raise Failure(f"{ended.words} does not say how it can be continued: {tail(ended.said)}")


def memory(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """What a run remembers of its files, or the lock of a stage, is damaged: nothing may depend on it."""
    run, log = bench.copy(place), place / "log"
    went_well(run_to_end(["verify", str(run)], log))
    files = sorted((run / ".grm").iterdir())
    (run / ".grm" / f"{stage}.lock").write_text("")
    file = rng.choice(files)
    what, _ = damage(file, [], rng.choice(HOWS[:4]), rng)
    note(place, what)
    for words in (bench.words(stage, place), ["status", *bench.options(place)]):
        ended = run_to_end(words, log)
        went_well(ended)
        if "damaged" in ended.said or "up to date" not in ended.said:
            raise Failure(f"{what}: {ended.words} says {tail(ended.said)}")
    whole(bench, run)
    return Outcome(stage, f"{what} in .grm", 3, CONTINUED)
