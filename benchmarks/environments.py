"""Environments of peers whose versions do not fit ours: `make bench PEERS=1` makes them, with pinned versions."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workers import ROOT

FOLDER = ROOT / ".venv-peers"
TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True, slots=True)
class Environment:
    """A folder with a Python of its own."""

    name: str
    """Of the folder, and of the file of pinned versions in `benchmarks/peers/`."""

    @property
    def python(self) -> str:
        return str(FOLDER / self.name / "bin" / "python")

    @property
    def versions(self) -> Path:
        return ROOT / "benchmarks" / "peers" / f"{self.name}.txt"

    def make(self) -> None:
        """Make the environment, or do nothing where it is up to date.

        Raises:
            subprocess.CalledProcessError: pip failed; it has said why.
        """
        stamp = FOLDER / self.name / "made-from"
        cuda = _has_gpu()
        wanted = hashlib.sha256(self.versions.read_bytes()).hexdigest() + (" cuda" if cuda else " cpu")
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        print(f"peers: {self.name}, in {FOLDER.relative_to(ROOT)}/ (some minutes the first time)", flush=True)
        stamp.unlink(missing_ok=True)
        if not Path(self.python).is_file():
            subprocess.run([sys.executable, "-m", "venv", str(FOLDER / self.name)], check=True)
        if cuda:
            self._install(f"torch=={TORCH}")
        else:
            self._install_torch_for_cpu()
        self._install("--no-deps", "-r", str(self.versions))
        stamp.write_text(wanted)

    def _install(self, *words: str, quiet: bool = False) -> None:
        command = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "-qq", *words]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL if quiet else None)

    def _install_torch_for_cpu(self) -> None:
        # As scripts/setup.sh does: from pip's own configuration where it knows the CPU build, else from PyTorch.
        try:
            self._install(f"torch=={TORCH}+cpu", quiet=True)
        except subprocess.CalledProcessError:
            self._install("--extra-index-url", CPU_INDEX, f"torch=={TORCH}+cpu")


def _has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


TRL_PPO = Environment("trl-0.24")
ENVIRONMENTS = (TRL_PPO,)
