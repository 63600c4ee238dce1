"""The cases of a drill: kinds, how many of each, and which stages they concern; all drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.drill import damaged, hindered, killed
from experiments.drill.bench import STUDY, Bench
from experiments.drill.outcome import Outcome
from pipelines.stages import ALWAYS as STAGES

Act = Callable[[Bench, str, Path, random.Random], Outcome]
"""(bench, stage, folder of the case, its generator) -> how it ended; raises Failure."""
LONG = ("preferences", "rm", "bon", "ppo", "eval")
QUICK = ("prompts", "report")
SHORT = "prompts"
"""The stage of a short drill."""


class Kind(NamedTuple):
    name: str
    act: Act
    share: float
    """Of all cases."""
    stages: tuple[str, ...]
    """Taken in turn."""
    long: bool
    """Whether models are loaded: a case takes up to a minute on an idle core, and not a few seconds."""


KINDS = (
    Kind("damage to a finished stage", damaged.finished, 0.42, tuple(STAGES), False),
    Kind("damage to unfinished work", damaged.unfinished, 0.07, LONG, True),
    Kind("damage to what is remembered", damaged.memory, 0.02, tuple(STAGES), False),
    Kind("kill -9", killed.kill, 0.11, (*LONG, STUDY), True),
    Kind("kill -9 of a quick stage", killed.kill, 0.06, QUICK, False),
    Kind("SIGTERM, Ctrl-C, Ctrl-C twice", killed.stop, 0.04, ("ppo", "rm", STUDY, "eval", "bon", "preferences"), True),
    Kind("SIGTERM, Ctrl-C of a quick stage", killed.stop, 0.04, QUICK, False),
    Kind("--force and kill -9", killed.again, 0.03, QUICK, False),
    Kind("two processes at once", killed.two, 0.03, QUICK, False),
    Kind("two long processes at once", killed.two, 0.02, ("rm", STUDY, "ppo"), True),
    Kind("readers meanwhile", killed.readers, 0.01, QUICK, False),
    Kind("a vLLM server lost", killed.server, 0.01, ("ppo",), True),
    Kind("full disk", hindered.full_disk, 0.02, QUICK, False),
    Kind("full disk of a long stage", hindered.full_disk, 0.04, LONG, True),
    Kind("no permission", hindered.permission, 0.04, tuple(STAGES), False),
    Kind("read-only run", hindered.reader_permission, 0.01, tuple(STAGES), False),
    Kind("clock set back", hindered.clock, 0.01, (*QUICK, "rm", "ppo"), False),
    Kind("times of files", hindered.file_times, 0.02, tuple(STAGES), False),
)


class Case(NamedTuple):
    number: int
    kind: Kind
    stage: str


def drawn(number: int, seed: int) -> list[Case]:
    """About `number` cases, of every kind at least one, in a random order; the first ones of each kind come to the same
    whatever the number is."""
    cases = []
    for kind in KINDS:
        for k in range(max(1, round(kind.share * number))):
            cases.append((kind, kind.stages[k % len(kind.stages)]))
    random.Random(f"{seed} order").shuffle(cases)
    return [Case(i, kind, stage) for i, (kind, stage) in enumerate(cases)]


def generator(case: Case, seed: int) -> random.Random:
    """What decides everything else about a case, but for the speed of the machine."""
    return random.Random(f"{seed} {case.number} {case.kind.name} {case.stage}")


def short(number: int, seed: int) -> list[Case]:
    """About `number` cases of the stage that takes the shortest, of the kinds that load no model."""
    kinds = [kind for kind in KINDS if not kind.long and SHORT in kind.stages]
    return [Case(i, kinds[i % len(kinds)], SHORT) for i in range(number)]
