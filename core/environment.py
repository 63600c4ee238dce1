"""The environment of a stage's process: threads, allocator, and how much the libraries print."""

from __future__ import annotations

import ctypes.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError

STARTED = "GRM_STAGE_STARTED"
"""Its value is the number of ranks that share this machine."""
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files: no GPU can be used without one of them (CUDA, ROCm, WSL)."""


def may_have_gpu() -> bool:
    """False where there cannot be a GPU. Needs no torch, whose import takes a second."""
    return any(Path(driver).exists() for driver in GPU_DRIVERS)


def num_gpus() -> int:
    """GPUs that torch can use."""
    if not may_have_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


def own_gpu(number: int) -> dict[str, str]:
    """Variables by which a process sees one GPU alone, that of this number; none where there are no GPUs.

    Raises:
        ConfigError: there are fewer GPUs.
    """
    gpus = visible_gpus()
    if not gpus:
        return {}
    if number >= len(gpus):
        raise ConfigError(f"each process needs a GPU of its own, and here are {len(gpus)}: lower generation.processes")
    return {"CUDA_VISIBLE_DEVICES": gpus[number]}


def visible_gpus() -> list[str]:
    """The GPUs that torch can use, by what CUDA_VISIBLE_DEVICES calls them."""
    seen, count = os.environ.get("CUDA_VISIBLE_DEVICES"), num_gpus()
    return seen.split(",")[:count] if seen else [str(number) for number in range(count)]


def is_started() -> bool:
    """True in a process that has the environment of a stage."""
    return STARTED in os.environ


def is_rank() -> bool:
    """True in a process that is to run a stage itself: one that `grm` started, or a rank of the user's own torchrun."""
    return is_started() or "TORCHELASTIC_RUN_ID" in os.environ


def variables(ranks: int) -> dict[str, str]:
    """Variables for `ranks` processes that share this machine."""
    settings = {STARTED: str(ranks), "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # What DeepSpeed compiles for some of its own settings, it compiles with the ninja of this environment.
    settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    # Notices of libraries would hide ours: torch alone prints a line for each backward pass.
    settings |= {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DEEPSPEED_LOG_LEVEL": "error"}
    settings |= {"DS_LOG_LEVEL": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # vLLM in the trainer's own process: weights pass without a copy between processes.
    settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    settings["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    settings["VLLM_NO_USAGE_STATS"] = "1"
    cache = Path(os.environ.get("VLLM_CACHE_ROOT") or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    if not may_be_written(cache):  # vLLM prints a traceback for each model where its cache cannot be written
        elsewhere = Path(tempfile.gettempdir(), f"grm-{os.getuid()}")
        settings |= {"VLLM_CACHE_ROOT": str(elsewhere / "vllm"), "MPLCONFIGDIR": str(elsewhere / "matplotlib")}
    if num_gpus():
        return settings
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    settings |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        # vLLM keeps a core for itself and pins threads by default; the trainer needs the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "KMP_BLOCKTIME": "1",  # OpenMP threads that spin after their work take the cores of the other rank
    }
    return settings | preloaded([lib for lib in (_tcmalloc(), _intel_openmp()) if lib])


def preloaded(libraries: Sequence[str]) -> dict[str, str]:
    """Variables by which programs load these libraries before all others.

    Spaces separate the names in LD_PRELOAD, so a library in a folder with a space is looked for by its name alone.
    """
    odd = [lib for lib in libraries if " " in lib]
    names = [Path(lib).name if lib in odd else lib for lib in libraries]
    names += filter(None, [os.environ.get("LD_PRELOAD")])
    folders = [*(str(Path(lib).parent) for lib in odd), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    found = {"LD_PRELOAD": ":".join(names)} if names else {}
    return found | ({"LD_LIBRARY_PATH": ":".join(folders)} if odd else {})


def may_be_written(folder: Path) -> bool:
    """Whether a folder, or the first one above it that exists, can be written."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _tcmalloc() -> str | None:
    """tcmalloc makes generation on CPU some 10% faster; used where the system has it."""
    return ctypes.util.find_library("tcmalloc_minimal")


def _intel_openmp() -> str | None:
    found = sorted(Path(sys.prefix, "lib").glob("libiomp5.so"))
    return str(found[0]) if found else None
