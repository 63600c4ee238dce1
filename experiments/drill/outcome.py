"""How a case of a drill may end, and what a command must not do."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from core.artefacts import read_manifest
from core.errors import EXIT_BUSY, EXIT_REFUSED, ArtefactError
from core.reporting.crash import EXIT_CRASHED
from experiments.drill.bench import LIMIT, STUDY, Bench, differences, run_to_end
from experiments.drill.models import NAME
from experiments.drill.processes import HUNG, Ended
from pipelines.stages import ALWAYS as STAGES

CONTINUED = "continued to the same result"
REFUSED = "refused by name"
FAILED = "failed"
OUTCOMES = (CONTINUED, REFUSED, FAILED)
ADVICE = re.compile(r"`grm [\w-]+|the same command|again|delete |wait for it|put the files back")
"""What a refusal of damaged or missing files must say: a command that makes them again, or what else to do."""
EXPECTED = re.compile(
    r"^$"
    r"|^grm "  # the message, and "grm STAGE: interrupted"
    r"|^ {2}\S"  # its further lines
    r"|^run that stage again|^`grm \S+ --force` makes it again"  # its last line
    r"|^(\S+ )?(prompts|preferences|rm|bon|ppo|eval|report|study)( +\d+)?: "  # what a stage says of itself
    r"|^stops after the current step"
    r"|\d+%\||\d+(step|prompt|policy|it|B)?/?s?\b.*\[\d+:\d+"  # progress bars
)
"""Lines that a command may print when it is refused or ended: all others are noise, which hides its message."""
NOTE = "what"
MOST_TRIES = 60
"""So often the same command is given again while processes of a killed one end."""


class Outcome(NamedTuple):
    stage: str
    what: str
    """What was done, for people."""
    tries: int
    """Commands that were run until the end."""
    outcome: str
    why: str = ""
    """Of a failure."""


class Failure(Exception):
    """The case has failed; says why."""


def note(place: Path, what: str) -> str:
    """Leave in the folder of a case what is done in it, before it is done; the same text."""
    (place / NOTE).write_text(what)
    return what


def sound(ended: Ended) -> None:
    """Failure where a command hung, crashed or printed a traceback."""
    if ended.status == HUNG:
        raise Failure(f"{ended.words} hung; it had said: {tail(ended.said)}")
    if "Traceback (most recent call last)" in ended.said:
        raise Failure(f"{ended.words} ended with status {ended.status} and a traceback: {tail(ended.said)}")
    if ended.status == EXIT_CRASHED or "this was not foreseen" in ended.said:
        raise Failure(f"{ended.words} crashed: {tail(ended.said)}")


def quiet(ended: Ended) -> None:
    """Failure where a command that was refused or ended printed other lines than its message and its progress."""
    # Progress bars leave spaces, and move the cursor before what comes after them.
    moved = [re.sub(r"^.*\x1b\[[0-9;]*[A-Za-z]", "", line) for line in re.split(r"[\n\r]+", ended.said)]
    lines = [line.rstrip() for line in moved]
    if noise := [line for line in lines if not EXPECTED.search(line)]:
        raise Failure(f"{ended.words} printed {len(noise)} lines besides its message, such as {noise[0][:200]!r}")


def refused(
    ended: Ended, names: Sequence[str], *, status: int = EXIT_REFUSED, advice: re.Pattern | None = ADVICE
) -> None:
    """Failure unless a command was refused with this status and one message that has one of `names`, and advice."""
    sound(ended)
    if ended.status != status:
        raise Failure(f"{ended.words} ended with status {ended.status}, not {status}: {tail(ended.said)}")
    if not any(name in ended.said for name in names):
        raise Failure(f"{ended.words} names none of {', '.join(names)}: {tail(ended.said)}")
    if advice and not advice.search(ended.said):
        raise Failure(f"{ended.words} does not say what to do: {tail(ended.said)}")
    if not ended.words.startswith("grm verify"):  # which has a line for each stage
        quiet(ended)


def went_well(ended: Ended) -> None:
    """Failure unless a command ended with status 0."""
    sound(ended)
    if ended.status:
        raise Failure(f"{ended.words} ended with status {ended.status}: {tail(ended.said)}")


def go_on(bench: Bench, stage: str, runs: Path, log: Path, more: Sequence[str] = ()) -> int:
    """The same command to its end, and its result compared with the unbroken one; how often it had to be given.

    While processes of a killed command end, `grm` says so and is asked again, as its user would do.
    """
    ended, tries = run_to_end([*bench.words(stage, runs), *more], log, LIMIT), 1
    while ended.status == EXIT_BUSY:
        refused(ended, [stage], status=EXIT_BUSY)
        if tries == MOST_TRIES:
            raise Failure(f"{ended.words} was refused {tries} times: {tail(ended.said)}")
        time.sleep(1)
        ended, tries = run_to_end([*bench.words(stage, runs), *more], log, LIMIT), tries + 1
    went_well(ended)
    same(bench, stage, runs)
    return tries


def same(bench: Bench, stage: str, runs: Path) -> None:
    """Failure unless the result of a stage, or of the study, is that of the unbroken run, and all else is whole."""
    expected, found = (bench.study, runs / STUDY) if stage == STUDY else (bench.run / stage, runs / NAME / stage)
    if lines := differences(expected, found):
        raise Failure(f"another result: {'; '.join(lines[:4])}")
    if stage != STUDY:
        whole(bench, runs / NAME, without=stage)


def whole(bench: Bench, run: Path, *, without: str = "") -> None:
    """Failure where a finished stage of a copied run is lost or is not what it was."""
    for stage in STAGES:
        if stage == without or not (run / stage).exists():
            continue
        try:
            if read_manifest(run / stage) is None:
                raise Failure(f"the finished stage {stage} has lost its manifest")
        except ArtefactError as error:
            raise Failure(f"a finished stage is damaged: {error}") from None
        if lines := differences(bench.run / stage, run / stage):
            raise Failure(f"the finished stage {stage} is not what it was: {'; '.join(lines[:4])}")


def tail(text: str, most: int = 600) -> str:
    """The end of what a command said, on one line, without progress bars."""
    lines = [line.strip() for line in re.split(r"[\n\r]+", text) if line.strip() and not re.search(r"\d+%\|", line)]
    return " | ".join(lines)[-most:]
