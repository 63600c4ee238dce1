"""The command line: `grm STAGE --config F [a.b=value ...]`, overviews of runs, and tools."""

from __future__ import annotations

from core import interrupt

# isort: split
import argparse
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from core import environment, starting, whereabouts
from core.config import Config
from core.config.explain import explain
from core.config.load import load
from core.errors import EXIT_BUSY, EXIT_LOST, EXIT_REFUSED, ArtefactError, Busy, ConfigError, DataError
from core.locks import writing
from core.machine import describe
from core.ranks import end_with_launcher
from core.reporting.crash import EXIT_CRASHED, crash, refusal
from core.stopping import EXIT_STOPPED, Stopped
from pipelines import command_line, launch, runs, stages, verify
from pipelines.command_line import TOOLS

interrupt.answer()
GOLD = ("prompts", "preferences", "rm")
"""The stages of `grm gold`."""


def main(argv: list[str] | None = None) -> int:
    """Run `grm ARGUMENTS`; the exit status. What goes wrong is told in one message, foreseen or not."""
    arguments = sys.argv[1:] if argv is None else argv
    status = _status_of(arguments)
    whereabouts.leave(well=status == 0)
    return status


def _status_of(arguments: list[str]) -> int:
    name, rest = command_line.split(arguments)
    prefix = (f"grm {name}" if name else "grm") + launch.rank_in_words()
    try:
        return _command(name, rest, arguments)
    except (ConfigError, ArtefactError, DataError) as error:
        told = getattr(error, "together", False) and os.environ.get("RANK", "0") != "0"
        return _failed("" if told else f"{prefix}: {error}", EXIT_REFUSED)
    except Busy as error:
        return _failed(f"{prefix}: {error}", EXIT_BUSY)
    except Stopped as reason:
        return _failed("" if launch.is_ours() else f"{prefix}: {reason}", EXIT_STOPPED)
    except KeyboardInterrupt:
        return _failed(f"{prefix}: interrupted; the same command goes on from what is saved", 128 + signal.SIGINT)
    except Exception as error:
        if environment.is_rank() and whereabouts.is_loss(error):
            lost = whereabouts.loss(error, launched=launch.is_ours())
            return _failed(f"{prefix}: {lost}" if lost else "", EXIT_LOST)
        if said := refusal(error):
            return _failed(f"{prefix}: {said}", EXIT_REFUSED)
        return _failed(f"{prefix}: {crash(error, ['grm', *arguments])}", EXIT_CRASHED)


def _failed(message: str, status: int) -> int:
    if message:
        print(message, file=sys.stderr)
    return status


def _command(name: str | None, rest: list[str], arguments: list[str]) -> int:
    if name is None or name not in command_line.COMMANDS:
        return command_line.help_or_error(name, rest)
    if name in TOOLS:
        return _as_far_as_read(lambda: importlib.import_module(TOOLS[name].module).main(rest) or 0)
    options = command_line.parser(name).parse_intermixed_args(rest)  # options may stand among overrides
    if name in OVERVIEWS:
        return _as_far_as_read(lambda: OVERVIEWS[name](options))
    return _stages(name, options, arguments)


def _as_far_as_read(command: Callable[[], int]) -> int:
    """Run a command that prints, as much of it as somebody reads: `grm runs | head`. A pipe that breaks elsewhere
    within it is an error like any other."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed at the end
        return 128 + signal.SIGPIPE


def _reader_left() -> bool:
    """Whether nobody reads what this process prints."""
    output = select.poll()
    output.register(sys.stdout, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def _stages(command: str, options: argparse.Namespace, given: list[str]) -> int:
    """Run a stage; with --from, the stages that it needs and that the other run cannot give.

    Args:
        given: the whole command line, with which a rank of the user's own torchrun starts again.
    """
    cfg = load(options.config, options.overrides)
    arguments = [part for file in options.config for part in ("--config", file)] + options.overrides
    names = list(GOLD) if command == "gold" else [command]
    if command not in [*stages.in_use(cfg), "gold"]:
        stages.say(
            f"{command}: nothing to do: the configuration has no section `{command}`, so the policy stays as it is"
        )
        return 0
    if environment.is_rank():
        if options.source:
            raise ConfigError("--from links stages before processes are started: call `grm` without torchrun for it")
        for name in names:
            launch.check_ranks(name, cfg, launch.world_size())
        if not environment.is_started():
            launch.restart(given, names[-1])
        starting.collect_less()
        for name in names:
            launch.run_here(name, cfg, force=options.force)
        return 0
    end_with_launcher()  # where it is `grm study`
    source = None
    if options.source:
        source = runs.check_source(cfg, runs.folder_of(options.source))
        for stage, what in runs.plan(names[-1], cfg, source, force=options.force):
            stages.say(f"{stage}: {what}")
        names = runs.needed_by(names[-1], cfg)
    began = starting.command_began()
    for name in names:
        force = options.force and (name == command or command == "gold")
        if status := _stage(name, cfg, [name, *arguments], force=force, source=source, began=began):
            return status
        began = time.monotonic()
    return 0


def _stage(name: str, cfg: Config, arguments: list[str], *, force: bool, source: Path | None, began: float) -> int:
    if not force and stages.staleness(name, cfg) == []:  # whoever only looks must not wait
        runs.settle(name, cfg, source)
        return 0
    with writing(cfg.run_dir, name):
        if not force and runs.settle(name, cfg, source):
            return 0
        stages.fingerprint(stages.STAGES[name], cfg)  # missing inputs are reported before a process is started
        if not force and (changed := stages.staleness(name, cfg)):
            stages.say(f"{name}: re-run, because " + "; ".join(changed[:5]))
        return launch.run_stage_process(cfg, arguments + (["--force"] if force else []), began=began)


def _config(options: argparse.Namespace) -> int:
    if options.explain is not None:
        if options.overrides:
            raise ConfigError(
                f"--explain shows what options mean, so it takes no values: leave out {options.overrides[0]}"
            )
        print(explain(options.explain))
        return 0
    cfg = load(options.config, options.overrides)
    print(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False), end="")
    return 0


def _status(options: argparse.Namespace) -> int:
    cfg = load(options.config, options.overrides)
    print(f"run {cfg.run_dir}", *runs.status(cfg), sep="\n")
    return 0


def _env(_: argparse.Namespace) -> int:
    print(*describe(), sep="\n")
    return 0


def _runs(options: argparse.Namespace) -> int:
    print(*runs.list_runs(options.folder), sep="\n")
    return 0


def _diff(options: argparse.Namespace) -> int:
    print(*runs.diff(*map(runs.folder_of, (options.first, options.second))), sep="\n")
    return 0


def _clean(options: argparse.Namespace) -> int:
    folder = runs.folder_of(options.run) if options.run else load(options.config, []).run_dir
    print(*runs.clean(folder, delete=options.yes), sep="\n")
    return 0


def _verify(options: argparse.Namespace) -> int:
    folders = [runs.folder_of(run) for run in options.runs] or [load(options.config, []).run_dir]
    well = True
    for line, fine in verify.verify(folders):
        print(line, flush=True)
        well = well and fine
    return 0 if well else 1


OVERVIEWS = {
    "config": _config,
    "status": _status,
    "runs": _runs,
    "diff": _diff,
    "verify": _verify,
    "clean": _clean,
    "env": _env,
}
"""Commands that run no stage."""


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # vLLM and DeepSpeed leave threads and process groups whose tear-down order can crash a finished stage.
    os._exit(status) if environment.is_started() else sys.exit(status)
