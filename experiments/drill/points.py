"""Random moments of a stage's command, at which something is done to it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

from core.artefacts import MANIFEST, read_manifest
from experiments.drill.bench import LIMIT, POLICIES, STUDY, Bench, before
from experiments.drill.models import NAME
from experiments.drill.processes import Command
from pipelines.stages import ALWAYS as STAGES

PASSING = {
    "preferences": ["samples/shard-0000.parquet", "samples/shard-0002.parquet"],
    "bon": ["samples/shard-0000.parquet", "samples/shard-0001.parquet"],
    "ppo": ["state/000001", "state/last.json", "state/000002"],
}
"""Files that a stage deletes before it ends."""
STUDY_PARTS = (("study",), ("study",), (*POLICIES, "study"), ("eval", "study"))
"""What of a finished study is not there before the command: most of it takes long."""


class Point:
    """A moment: when the command has used a drawn share of the processor time of the unbroken stage, which does not
    depend on how busy the machine is; or when a file appears."""

    def __init__(self, bench: Bench, stage: str, runs: Path, rng: random.Random):
        self._file: Path | None = None
        self._after = rng.random() * bench.seconds[stage]
        self.what = f"after {self._after:.1f} s of {bench.seconds[stage]:.1f} s of a processor"
        if rng.random() < 0.5:
            partial, names = _written(bench, stage, runs)
            name = rng.choice(names)
            self._file, self.what = partial / name, f"when {name} appears"

    def reached(self, command: Command) -> bool:
        """Wait for the moment; False where the command has ended before."""
        while command.running() and command.seconds() < LIMIT:
            if self._file is not None and self._file.exists():
                return True
            if self._file is None and command.processor_seconds() >= self._after:
                return True
            time.sleep(0.002 if self._file else 0.02)
        return command.running()


def _written(bench: Bench, stage: str, runs: Path) -> tuple[Path, list[str]]:
    """Where a stage works, and what it writes there."""
    if stage == STUDY:
        return runs / STUDY / "study", ["curves.csv", "policies.json", "checks.json", "per_prompt.csv"]
    manifest = read_manifest(bench.run / stage) or {"outputs": ()}
    outputs = [o["path"] for o in manifest["outputs"] if not o["path"].startswith("tensorboard")]
    return runs / NAME / f"{stage}.partial", [*outputs, *PASSING.get(stage, []), MANIFEST]


def setting(bench: Bench, stage: str, runs: Path, rng: random.Random) -> str:
    """Copy what a stage needs into the folder of a case, and what is finished and does not depend on it; what is there
    in words."""
    if stage == STUDY:
        without = rng.choice(STUDY_PARTS)
        bench.copy_study(runs, without)
        return f"without its {' and '.join(without)}; "
    bench.copy(runs, before(stage))
    return ""


def left_over(commands: Sequence[Command], runs: Path) -> list[str]:
    """What should not be there when all commands of a case have ended: processes, and copies of folders."""
    for _ in range(300):
        if not (pids := [pid for c in commands for pid in c.pids()]):
            break
        time.sleep(0.2)
    lines = [f"{len(pids)} processes still run"] if pids else []
    for run in (runs / NAME, runs / STUDY):
        lines += [str(p) for s in STAGES for p in run.glob(f"{s}.partial*")]
    return lines
