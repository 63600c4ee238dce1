"""Cases in which processes are killed, stopped, or started twice."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from core.artefacts import REPLACED
from core.errors import EXIT_BUSY
from core.http import ask_json
from core.ranks import free_port
from core.stopping import EXIT_STOPPED
from experiments.drill.bench import LIMIT, STUDY, Bench, before, run_to_end
from experiments.drill.models import NAME
from experiments.drill.outcome import (
    CONTINUED,
    REFUSED,
    Failure,
    Outcome,
    go_on,
    note,
    quiet,
    refused,
    same,
    sound,
    tail,
    went_well,
    whole,
)
from experiments.drill.points import Point, left_over, setting
from experiments.drill.processes import Command

ENDED = (0, EXIT_STOPPED, 128 + signal.SIGINT, 128 + signal.SIGKILL, 128 + signal.SIGTERM)
"""Statuses of a command that signals have ended, or that was done before."""


def kill(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """kill -9 of `grm`, of the processes that it started, or of all of them."""
    there = setting(bench, stage, place, rng)
    point, whom = Point(bench, stage, place, rng), rng.choice(("grm", "its processes", "all"))
    what = note(place, f"{there}{whom} killed {point.what}")
    command = Command(bench.words(stage, place), place / "killed.log")
    if point.reached(command):
        every = command.pids()
        chosen = {"grm": [command.process.pid], "all": every}.get(whom) or [
            pid for pid in every if pid != command.process.pid
        ]
        command.signal(signal.SIGKILL, chosen)
    return _continued(bench, stage, place, command, what)


def stop(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """SIGTERM to `grm`, or Ctrl-C, once or twice."""
    there = setting(bench, stage, place, rng)
    point, how = Point(bench, stage, place, rng), rng.choice(("SIGTERM", "Ctrl-C", "Ctrl-C twice", "Ctrl-C twice"))
    gap = rng.choice((0.0, 0.05, 0.5, 2.0))
    what = note(place, f"{there}{how}{f', {gap:g} s apart,' if 'twice' in how else ''} {point.what}")
    command = Command(bench.words(stage, place), place / "killed.log")
    if point.reached(command):
        if how == "SIGTERM":
            command.signal(signal.SIGTERM)
        else:
            command.signal(signal.SIGINT, command.foreground())
        if how == "Ctrl-C twice":
            time.sleep(gap)
            command.signal(signal.SIGINT, command.foreground())
    return _continued(bench, stage, place, command, what)


def _continued(bench: Bench, stage: str, place: Path, command: Command, what: str) -> Outcome:
    """What the first command said was right, and the same command comes to the same result."""
    ended = command.end(LIMIT)
    sound(ended)
    if ended.status not in ENDED:
        raise Failure(f"{ended.words} ended with status {ended.status}: {tail(ended.said)}")
    if ended.status:
        quiet(ended)
    if stage != STUDY:
        whole(bench, place / NAME, without=stage)
    if not ended.status:
        what += " (it had ended)"
    tries = 1 + go_on(bench, stage, place, place / "log")
    if lines := left_over([command], place):
        raise Failure(f"left over: {'; '.join(lines)}")
    return Outcome(stage, what, tries, CONTINUED)


def again(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """A finished stage is run again with --force and killed: what was finished must not be lost."""
    run = bench.copy(place)
    point = Point(bench, stage, place, rng)
    what = note(place, f"--force, killed {point.what}")
    command = Command([*bench.words(stage, place), "--force"], place / "killed.log")
    if point.reached(command):
        command.signal(signal.SIGKILL, command.pids())
    sound(command.end(LIMIT))
    kept = [run / stage, *(run / REPLACED).glob(f"{stage}-*")]
    if not any((folder / "manifest.json").is_file() for folder in kept):
        raise Failure(f"no finished {stage} is left, neither in its place nor in {REPLACED}")
    tries = 1 + go_on(bench, stage, place, place / "log")
    return Outcome(stage, what, tries, CONTINUED)


def two(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """The same command twice: the second one is refused, or finds the stage done."""
    there = setting(bench, stage, place, rng)
    point = Point(bench, stage, place, rng)
    what = note(place, f"{there}a second command {point.what}")
    first = Command(bench.words(stage, place), place / "first.log")
    point.reached(first)
    second = Command(bench.words(stage, place), place / "second.log")
    ended = [second.end(LIMIT), first.end(2 * LIMIT)]
    statuses = sorted(e.status for e in ended)
    for one in ended:
        sound(one)
        if one.status == EXIT_BUSY:
            refused(one, ["is being written by"], status=EXIT_BUSY)
        elif one.status:
            raise Failure(f"{one.words} ended with status {one.status}: {tail(one.said)}")
    if statuses[0]:
        raise Failure(f"neither of two commands ended well: {statuses}")
    same(bench, stage, place)
    return Outcome(stage, what, 2, REFUSED if statuses[1] == EXIT_BUSY else CONTINUED)


def readers(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """Overviews are read again and again while a finished stage is made again."""
    run, tries = bench.copy(place), 1
    command = Command([*bench.words(stage, place), "--force"], place / "first.log")
    while command.running():
        words = rng.choice((["status", *bench.options(place)], ["runs", str(place)], ["verify", str(run)]))
        ended = run_to_end(words, place / "log")
        went_well(ended)
        tries += 1
    went_well(command.end(LIMIT))
    same(bench, stage, place)
    return Outcome(stage, f"{tries - 1} overviews were read meanwhile", tries, CONTINUED)


def server(bench: Bench, stage: str, place: Path, rng: random.Random) -> Outcome:
    """A `grm vllm-serve` that PPO samples from is killed, or hangs: PPO names it, and goes on with a new one."""
    bench.copy(place, before(stage))
    url = f"http://127.0.0.1:{free_port()}"
    whom = rng.choice(("the server killed", "its engine killed", "the server stopped (SIGSTOP)"))
    steps = rng.randrange(2)
    words = [*bench.words(stage, place), f"ppo.vllm_servers=[{url}]"]
    what = note(place, f"{whom} after {steps} steps")
    serving = _serve(bench, url, place)
    try:
        command = Command(words, place / "first.log")
        metrics = place / NAME / "ppo.partial" / "metrics.jsonl"
        _wait(lambda: metrics.is_file() and metrics.read_text().count("\n") >= steps, command)
        time.sleep(rng.random())
        _strike(serving, whom)
        ended = command.end(LIMIT)
        if ended.status:
            refused(ended, [url], advice=None)
    finally:
        serving.kill_all()
    serving = _serve(bench, url, place)
    try:
        went_well(run_to_end(words, place / "log"))
    finally:
        serving.kill_all()
    rows = (place / NAME / "ppo" / "metrics.jsonl").read_text().splitlines()
    if len(rows) != 3:
        raise Failure(f"{len(rows)} steps in metrics.jsonl, not 3")
    whole(bench, place / NAME, without=stage)
    return Outcome(stage, what, 2, REFUSED if ended.status else CONTINUED)


def _strike(serving: Command, whom: str) -> None:
    engine = [pid for pid in serving.pids() if pid != serving.process.pid]
    if whom.startswith("the server killed"):
        serving.signal(signal.SIGKILL)
    elif whom.startswith("its engine"):
        serving.signal(signal.SIGKILL, engine)
    else:
        serving.signal(signal.SIGSTOP, [serving.process.pid, *engine])


def _serve(bench: Bench, url: str, place: Path) -> Command:
    port = url.rpartition(":")[2]
    serving = Command(["vllm-serve", *bench.options(place), "--port", port], place / "server.log")
    _wait(lambda: _answers(f"{url}/v1/models"), serving)
    return serving


def _answers(url: str) -> bool:
    try:
        ask_json(url, None, 5)
    except (OSError, ValueError):
        return False
    return True


def _wait(holds: Callable[[], bool], command: Command) -> None:
    while not holds():
        if not command.running() or command.seconds() > LIMIT:
            ended = command.end(LIMIT)
            raise Failure(
                f"{ended.words}, with status {ended.status}, is not where the case begins: {tail(ended.said)}"
            )
        time.sleep(0.1)
