"""How a stage becomes a process: threads, allocator, and one process per rank by torchrun.

Both must be decided before Python starts, so `grm` starts each stage in a new process with the right environment.
A rank of the user's own torchrun (`torchrun ... -m pipelines ppo`, on many nodes) starts again in that environment.
From there on both are the same: `check_ranks`, then `run_here`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import NoReturn

from core.config import Config
from core.environment import variables
from core.errors import ConfigError
from core.stopping import EXIT_STOPPED, MARK
from pipelines import runs, stages

STOP_SECONDS = 1800


def num_processes(name: str, cfg: Config) -> int:
    """Ranks of a stage on this machine."""
    processes = cfg.engine_of(stages.STAGES[name].engine).processes
    if processes != "auto":
        return processes
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def check_ranks(name: str, cfg: Config, ranks: int) -> None:
    """ConfigError where `ranks` processes cannot share the work of a stage as the configuration says."""
    stage = stages.STAGES[name]
    if not stage.distributed:
        if ranks > 1:
            raise ConfigError(f"stage {name} runs in one process, and torchrun started {ranks}: use `grm {name}`")
    elif faults := cfg.batch_faults(stage.engine, ranks):
        raise ConfigError(f"the configuration does not fit {ranks} ranks:\n  " + "\n  ".join(faults))


def world_size() -> int:
    """Ranks that torchrun started, on all machines; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def restart(arguments: list[str]) -> NoReturn:
    """Begin this rank of the user's own torchrun again, in the environment that `run_stage_process` gives to ranks."""
    environment = {**os.environ, **variables(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-u", "-m", "pipelines", *arguments], environment)


def run_here(name: str, cfg: Config, *, force: bool) -> None:
    """Run a stage in this process, one of its ranks, unless it is up to date."""
    check_ranks(name, cfg, world_size())
    if force or not _settled(name, cfg):
        stages.say(stages.run(name, cfg, force=force))


def _settled(name: str, cfg: Config) -> bool:
    """`runs.settle` by the first rank, since it may move folders; its answer on all ranks."""
    if world_size() == 1:
        return runs.settle(name, cfg, None)
    import torch

    from core.training import distributed

    distributed.init_distributed()
    answer = [runs.settle(name, cfg, None) if distributed.rank() == 0 else None]
    torch.distributed.broadcast_object_list(answer, device=distributed.device())
    return bool(answer[0])


def run_stage_process(cfg: Config, arguments: list[str]) -> int:
    """Run `python -m pipelines ARGUMENTS`, the first of which is a stage, on every rank that it needs; the exit status.

    Raises:
        ConfigError: the configuration does not fit the number of ranks.
    """
    distributed = stages.STAGES[arguments[0]].distributed
    ranks = num_processes(arguments[0], cfg) if distributed else 1
    check_ranks(arguments[0], cfg, ranks)
    # --standalone takes a free port by itself; many nodes use torchrun with a rendezvous (docs/scale.md).
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # On SIGTERM the ranks end their step and save; torchrun would kill them after 30 seconds.
    launcher = [*torchrun, f"--shutdown-timeout={STOP_SECONDS}"] if distributed else []
    command = [sys.executable, *launcher, "-m", "pipelines", *arguments]
    stage = subprocess.Popen(command, env={**os.environ, **variables(ranks)})
    signal.signal(signal.SIGTERM, lambda *_: stage.terminate())
    status = stage.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mark = cfg.run_dir / f"{arguments[0]}.partial" / MARK
    if status and mark.is_file():
        print(
            f"{arguments[0]}: stopped {mark.read_text().strip()}; the same command continues from there",
            file=sys.stderr,
        )
        return EXIT_STOPPED
    return status if status >= 0 else 128 - status
