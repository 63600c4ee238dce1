"""How a stage becomes processes: threads, allocator, and one process per rank.

These must be decided before Python starts, so `grm` starts each stage in a new process with the right environment.
A rank of the user's own torchrun (`torchrun ... -m pipelines ppo`, on many nodes) starts again in that environment.
From there on both are the same: `check_ranks`, then `run_here`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from typing import NoReturn

from core import environment, whereabouts
from core.config import Config
from core.config.vllm_arguments import rank_faults
from core.environment import STARTED, num_gpus, own_gpu, variables
from core.errors import ArtefactError, ConfigError
from core.locks import writing
from core.parts import drop_damaged
from core.ranks import AGENT, LAUNCHER, end_with_launcher, run_ranks, told_by_first
from core.starting import BEGAN, command_began
from core.stopping import EXIT_STOPPED, MARK
from pipelines import runs, stages
from pipelines.inputs import check_inputs

STOP_SECONDS = 1800
"""On SIGTERM the ranks end their step and save; after so long they are killed."""


def num_processes(name: str, cfg: Config, gpus: int | None = None, cores: int | None = None) -> int:
    """Ranks of a stage on this machine, or on one with so many GPUs and cores.

    Raises:
        ConfigError: more ranks that train together than there are GPUs.
    """
    stage, gpus = stages.STAGES[name], num_gpus() if gpus is None else gpus
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    if stage.distributed:
        processes = cfg.engine_of(stage.engine).processes
        if processes == "auto":
            return gpus or min(2, cores)
        if gpus and processes > gpus:
            raise ConfigError(
                f"{stage.engine}.engine.processes (or engine.processes) is {processes}, and every rank needs a GPU of "
                f"its own: there are {gpus}. Set it to auto"
            )
        return processes
    if stage.divided:
        wanted = cfg.generation.processes
        return gpus or 1 if wanted == "auto" else min(wanted, gpus or cores)
    return 1


def check_ranks(name: str, cfg: Config, ranks: int) -> None:
    """ConfigError where `ranks` processes cannot share the work of a stage as the configuration says."""
    stage = stages.STAGES[name]
    if stage.distributed:
        faults = cfg.batch_faults(stage.engine, ranks)
        if name == "ppo" and not cfg.ppo.vllm_servers:
            faults += rank_faults(cfg.generation.vllm.overrides, ranks)
        if faults:
            raise ConfigError(f"the configuration does not fit {ranks} ranks:\n  " + "\n  ".join(faults))
    elif ranks > 1 and not stage.divided:
        raise ConfigError(f"stage {name} runs in one process, and torchrun started {ranks}: use `grm {name}`")


def own_variables(name: str, ranks: int, number: int) -> dict[str, str]:
    """Variables of one of the `ranks` processes of a stage on this machine, beside those of all.

    Processes that divide a stage see one GPU each, so that each works as if it were alone.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    return own_gpu(number) if stages.STAGES[name].divided and ranks > 1 else {}


def world_size() -> int:
    """Ranks that work together: those that torchrun started, on all machines, or those that `grm` started on this."""
    return int(os.environ["WORLD_SIZE"] if "TORCHELASTIC_RUN_ID" in os.environ else os.environ.get(STARTED, "1"))


def rank_in_words() -> str:
    """ ", rank 1" where several ranks may print; else nothing."""
    several = environment.is_rank() and os.environ.get("WORLD_SIZE", "1") != "1"
    return f", rank {os.environ['RANK']}" if several and "RANK" in os.environ else ""


def is_ours() -> bool:
    """Whether this process is a rank that `grm` started, which says itself what became of its ranks."""
    return LAUNCHER in os.environ


def restart(arguments: list[str], stage: str | None = None) -> NoReturn:
    """Begin this rank of the user's own torchrun again, in the environment that `run_stage_process` gives to ranks.

    Args:
        arguments: the whole command line.
        stage: that it runs; None for a tool.
    """
    ranks, number = (int(os.environ.get(v, d)) for v, d in (("LOCAL_WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    own = own_variables(stage, ranks, number) if stage else {}
    settings = {**os.environ, **variables(ranks), **own, BEGAN: str(command_began()), AGENT: str(os.getppid())}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-u", "-m", "pipelines", *arguments], settings)


def run_here(name: str, cfg: Config, *, force: bool) -> None:
    """Run a stage in this process, one of its ranks, unless it is up to date."""
    end_with_launcher()
    check_ranks(name, cfg, world_size())
    stage = stages.STAGES[name]
    if stage.distributed or world_size() > 1:
        engine = cfg.engine_of(stage.engine) if stage.distributed else cfg.engine
        whereabouts.begin(
            whereabouts.folder_of(cfg.run_dir, name), rank=int(os.environ.get("RANK", "0")), world=world_size(),
            timeout=engine.rank_timeout, name=f"grm {name}{rank_in_words()}",
        )  # fmt: skip
    # Whoever started this rank holds the lock; where that is torchrun, the first rank does.
    is_first = int(os.environ.get("RANK", "0")) == 0
    with writing(cfg.run_dir, name) if is_first and not is_ours() else nullcontext():
        if force or not _settled(name, cfg):
            stages.say(stages.run(name, cfg, force=force))


def _settled(name: str, cfg: Config) -> bool:
    """`runs.settle` by the first rank, since it may move folders; its answer on all ranks, or its error.

    Where `grm` has not done so, the inputs are checked too.
    """

    def answer() -> str:
        try:
            return json.dumps(_settled_here(name, cfg))
        except ArtefactError as error:  # the others wait for an answer
            return json.dumps(str(error))

    told = json.loads(told_by_first(f"{name}: it is up to date", answer))
    if isinstance(told, str):
        raise ArtefactError(told)
    return told


def _settled_here(name: str, cfg: Config) -> bool:
    if runs.settle(name, cfg, None):
        return True
    if not is_ours():
        check_inputs(name, cfg)
        drop_damaged(cfg.run_dir / f"{name}.partial")
    return False


def bring_up_to_date(name: str, cfg: Config, arguments: list[str]) -> int:
    """Run a stage unless it is up to date, or a kept result fits; the exit status.

    Args:
        arguments: as of `run_stage_process`.
    """
    if stages.staleness(name, cfg) == []:
        stages.say(f"{cfg.run.name} {name}: up to date")
        return 0
    with writing(cfg.run_dir, name):
        return 0 if runs.settle(name, cfg, None) else run_stage_process(cfg, arguments)


def run_stage_process(cfg: Config, arguments: list[str], *, began: float | None = None) -> int:
    """Run `python -m pipelines ARGUMENTS`, the first of which is a stage, on every rank that it needs; the exit status.

    Args:
        began: when the command for this stage began, by the monotonic clock (None: now).

    Raises:
        ConfigError: the configuration does not fit the number of ranks, or of GPUs.
        ArtefactError: a file that the stage reads is damaged.
        Busy: another process writes the stage.
    """
    name = arguments[0]
    check_inputs(name, cfg)
    ranks = num_processes(name, cfg)
    check_ranks(name, cfg, ranks)
    own = {number: own_variables(name, ranks, number) for number in range(ranks)}
    of_all = {**os.environ, **variables(ranks), BEGAN: str(began or time.monotonic())}
    command = [sys.executable, "-u", "-m", "pipelines", *arguments]
    mark = cfg.run_dir / f"{name}.partial" / MARK
    places, failed = whereabouts.folder_of(cfg.run_dir, name), list[int]()
    with writing(cfg.run_dir, name):
        drop_damaged(mark.parent)
        mark.unlink(missing_ok=True)  # an earlier command's: this one may fail before it has read the state
        whereabouts.clear(places)
        status = run_ranks(command, of_all, ranks, stop_seconds=STOP_SECONDS, own=own.__getitem__, failed=failed.append)
        place = whereabouts.read(places).get(failed[0]) if failed else None
    if status and mark.is_file():
        print(f"{name}: stopped {mark.read_text().strip()}; the same command continues from there", file=sys.stderr)
        return EXIT_STOPPED
    if status < 0:
        which = f"rank {failed[0]} was " if failed and ranks > 1 else ""
        print(f"{name}: {which}{ended_by(-status, place)}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def ended_by(number: int, place: whereabouts.Place | None = None) -> str:
    """What is said of a rank that a signal has ended; `place` is where it was."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = ", as it is where memory runs out" if number == signal.SIGKILL else ""
    return f"ended by {name}{f' {place}' if place else ''}{why}; {whereabouts.CONTINUES}"
