"""Which policies of a run are kept: those of some steps, and wherever the KL has moved; of these the last n, and the
best by a rule that does not look at gold."""

from __future__ import annotations

import shutil
from pathlib import Path

from core.files import read_json, write_json


class PolicyKeeper:
    """The folders `checkpoints/step-*` of a run, and the scores of their policies in `policies.json`.

    The score of a policy is the mean reward of the rollout sampled from it, less the KL penalty. It is known one step
    after the policy was saved.

    Args:
        out: folder of the run.
        keep: how many of the latest policies to keep, in addition to the best one; None keeps all.
    """

    def __init__(self, out: Path, keep: int | None):
        self._folder, self._file, self._keep = out / "checkpoints", out / "policies.json", keep

    def folder(self, step: int) -> Path:
        """Where the policy after `step` is saved."""
        return self._folder / f"step-{step:04d}"

    def scores(self) -> dict[str, float]:
        """The scores so far, by step."""
        return read_json(self._file) if self._file.is_file() else {}

    def forget_after(self, step: int, scores: dict[str, float] | None = None) -> None:
        """Delete the policies of later steps, which a run that is resumed after `step` may not come to again.

        Args:
            scores: those that were known after `step`; None where they were not saved.
        """
        if scores:
            write_json(self._file, scores)
        elif step == 0 or scores is not None:
            self._file.unlink(missing_ok=True)
        for folder in self._folder.glob("step-*"):
            if int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)

    def scored(self, step: int, score: float) -> None:
        """Record the score of the policy after `step`, if that policy was saved, and delete what need not be kept."""
        if not self.folder(step).is_dir():
            return
        scores = {int(k): v for k, v in self.scores().items()}
        # A resumed run repeats steps whose scores are recorded already.
        scores = {k: v for k, v in scores.items() if k < step} | {step: score}
        write_json(self._file, {str(k): v for k, v in scores.items()})
        if self._keep is None:
            return
        steps = sorted(int(p.name.split("-")[1]) for p in self._folder.iterdir())
        coming = [s for s in steps if s > step]  # with `ppo.overlap`, scores come steps later
        kept = {*steps[-self._keep :], *coming, max(scores, key=scores.__getitem__)}
        for old in set(steps) - kept:
            shutil.rmtree(self.folder(old))
        write_json(self._file, {str(k): v for k, v in scores.items() if k in kept})


class Spacing:
    """Which policies are saved: every few steps, and whenever the KL from the reference has moved.

    Args:
        every: steps between those that are saved after their step.
        nats: by which the KL must have moved since the last saved policy; None for no such rule.
    """

    def __init__(self, every: int, nats: float | None):
        self._every, self._nats, self._last = every, nats, 0.0

    def after(self, step: int) -> bool:
        """Whether the policy after `step` is saved at once."""
        return step % self._every == 0

    def measured(self, step: int, kl: float) -> bool:
        """Whether the policy after `step`, 0 for the reference, is to be saved now that its KL (nats) is known."""
        saved = step == 0 or self.after(step)
        moved = self._nats is not None and not saved and abs(kl - self._last) >= self._nats
        if saved or moved:
            self._last = kl
        return moved

    def state_dict(self) -> dict[str, float]:
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._last = state["last"]
