"""How a stage becomes a process: threads, allocator, and one process per rank by torchrun.

Both must be decided before Python starts, so `grm` starts each stage in a new process with the right environment.
A stage that was started by a launcher already (`torchrun ... -m pipelines ppo`, on many nodes) runs in place.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from core.config import Config
from core.environment import variables
from core.stopping import EXIT_STOPPED, MARK

STOP_SECONDS = 1800


def num_processes(cfg: Config) -> int:
    """Ranks on this machine."""
    if cfg.engine.processes != "auto":
        return cfg.engine.processes
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def run_stage_process(cfg: Config, arguments: list[str], *, distributed: bool) -> int:
    """Run `python -m pipelines ARGUMENTS`, on every rank when `distributed`; the exit status."""
    ranks = num_processes(cfg) if distributed else 1
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
