"""How a stage becomes a process: threads, allocator, and one process per rank by torchrun.

Both must be decided before Python starts, so `grm` starts the stage anew with the right environment.
A stage that was started by a launcher already (`torchrun ... -m pipelines ppo`, on many nodes) runs in place.
"""

from __future__ import annotations

import ctypes.util
import os
import signal
import subprocess
import sys
from pathlib import Path

from core.config import Config
from core.stopping import EXIT_STOPPED, MARK

STOP_SECONDS = 1800
STARTED = "GRM_STAGE_STARTED"


def is_started() -> bool:
    """True in a process whose environment is settled: ours, or one of the user's own torchrun."""
    return STARTED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


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
    # Ranks that are told to stop end their step and save; torchrun would kill them after 30 seconds.
    launcher = [*torchrun, f"--shutdown-timeout={STOP_SECONDS}"] if distributed else []
    command = [sys.executable, *launcher, "-m", "pipelines", *arguments]
    stage = subprocess.Popen(command, env={**os.environ, **environment(ranks)})
    signal.signal(signal.SIGTERM, lambda *_: stage.terminate())
    status = stage.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mark = cfg.run_dir / f"{arguments[0]}.partial" / MARK
    if status and mark.is_file():
        print(
            f"{arguments[0]}: stopped {mark.read_text().strip()}; the same command goes on from there", file=sys.stderr
        )
        return EXIT_STOPPED
    return status if status >= 0 else 128 - status


def environment(ranks: int) -> dict[str, str]:
    """Variables for `ranks` processes that share this machine."""
    import torch

    settings = {STARTED: "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # DeepSpeed compiles an operation on first use, with the ninja of this environment.
    settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    # Libraries' notices would hide ours: one line a backward pass from torch alone.
    settings |= {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DEEPSPEED_LOG_LEVEL": "error"}
    settings |= {"DS_LOG_LEVEL": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # vLLM in the trainer's own process: weights pass without a copy between processes.
    settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    settings["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    settings["VLLM_NO_USAGE_STATS"] = "1"
    if torch.cuda.is_available():
        return settings
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    settings |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        # vLLM keeps a core for itself and pins threads unless told not to; the trainer needs the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "KMP_BLOCKTIME": "1",  # OpenMP threads that spin after their work take the cores of the other rank
    }
    preload = [lib for lib in (_tcmalloc(), _intel_openmp()) if lib]
    if preload:
        settings["LD_PRELOAD"] = ":".join([*preload, *filter(None, [os.environ.get("LD_PRELOAD")])])
    return settings


def _tcmalloc() -> str | None:
    """tcmalloc makes generation on CPU some 10% faster; used where the system has it."""
    return ctypes.util.find_library("tcmalloc_minimal")


def _intel_openmp() -> str | None:
    found = sorted(Path(sys.prefix, "lib").glob("libiomp5.so"))
    return str(found[0]) if found else None
