"""Starts the probes and keeps what they find: `grm plan --measure`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from core.config import ENGINE_STAGES, Config
from core.environment import variables
from core.errors import ArtefactError
from core.files import read_json, write_json
from core.machine import code_version, package_versions
from pipelines.plan.measured import machine
from pipelines.plan.probes import STARTED

GroupName = str


def groups(cfg: Config, ranks: Mapping[str, int]) -> dict[GroupName, tuple[int, bool]]:
    """Programs whose findings a plan of this configuration rests on: name -> (ranks, whether they have engines).

    Ranks with engines of the stages in use do what rm and ppo do. Processes without do what preferences, bon and eval
    do; one process always, for what is measured there alone.

    Args:
        ranks: of each stage that has several.
    """
    wanted: dict[int, set[int]] = {}
    for stage in ENGINE_STAGES:
        if stage in ranks:
            wanted.setdefault(ranks[stage], set()).add(cfg.engine_of(stage).zero_stage)
    found = {
        f"{count} ranks, zero {', '.join(map(str, sorted(zeros)))}": (count, True) for count, zeros in wanted.items()
    }
    divided = {1, *(count for stage, count in ranks.items() if stage not in ENGINE_STAGES)} - wanted.keys()
    return {("1" if count == 1 else f"{count} processes"): (count, False) for count in sorted(divided)} | found


def measure(cfg: Config, file: Path, names: Mapping[GroupName, tuple[int, bool]]) -> None:
    """Run the programs, one after the other, and put what they find into `file`, beside what is there.

    Raises:
        ArtefactError: a program failed; with the end of its output.
    """
    kept: dict[str, Any] = read_json(file) if file.is_file() else {"groups": {}}
    load = os.getloadavg()[0]
    command = _command(cfg)
    for name, (ranks, engines) in names.items():
        started = time.monotonic()
        kept["groups"][name] = _run(cfg, ranks, engines=engines) | {"took": round(time.monotonic() - started, 1)}
        kept["groups"][name]["starts"]["command"] = command
    facts: dict[str, Any] = {
        "machine": machine(),
        "packages": package_versions(),
        "code": code_version(),
        "model": cfg.policy.path,
        "load": round(load, 1),
        "dtype": [cfg.engine.dtype, cfg.generation.vllm.dtype],
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, kept | facts)


def _command(cfg: Config) -> float:
    """Seconds that `grm` takes itself: imports, the configuration, digests of the files that a stage depends on."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False))
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "pipelines", "status", "--config", str(config)], capture_output=True)
        return time.monotonic() - started


def _run(cfg: Config, ranks: int, *, engines: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder, "config.yaml"), Path(folder, "found.json")
        config.write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False))
        torchrun = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if engines or ranks > 1 else []
        )
        command: Sequence[str] = [sys.executable, *torchrun, "-m", "pipelines.plan.probes", str(config), str(out)]
        command = [*command, *(["engines"] if engines else [])]
        done = subprocess.run(
            command,
            env={**os.environ, **variables(ranks), STARTED: str(time.monotonic())},
            capture_output=True,
            text=True,
        )
        if done.returncode or not out.is_file():
            raise ArtefactError(
                f"the measurement on {ranks} rank(s) failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}"
            )
        return read_json(out)
