"""Which policies of a run are kept: the last so many, and the best by a rule that does not look at gold."""

from __future__ import annotations

import shutil
from pathlib import Path

from core.files import read_json, write_json


class PolicyKeeper:
    """Folders `checkpoints/step-*` of a run.

    A policy's score is the mean reward of the rollout sampled from it, less the KL penalty: known one step later.

    Args:
        keep: policies to keep beside the best one; None keeps all.
    """

    def __init__(self, out: Path, keep: int | None):
        self._folder, self._file, self._keep = out / "checkpoints", out / "policies.json", keep

    def folder(self, step: int) -> Path:
        return self._folder / f"step-{step:04d}"

    def scored(self, step: int, score: float) -> None:
        """Note the score of the policy that step `step` has left, if it was kept, and drop what need not be."""
        if not self.folder(step).is_dir():
            return
        scores = {int(k): v for k, v in read_json(self._file).items()} if self._file.is_file() else {}
        # A resumed run goes over steps that are noted already.
        scores = {k: v for k, v in scores.items() if k < step} | {step: score}
        write_json(self._file, {str(k): v for k, v in scores.items()})
        if self._keep is None:
            return
        steps = sorted(int(p.name.split("-")[1]) for p in self._folder.iterdir())
        kept = {*steps[-self._keep :], max(scores, key=scores.get)}
        for old in set(steps) - kept:
            shutil.rmtree(self.folder(old))
        write_json(self._file, {str(k): v for k, v in scores.items() if k in kept})
