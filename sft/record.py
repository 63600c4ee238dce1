"""What the stage does beside training: logs, progress, held-out NLL, and the end after SIGTERM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from core import whereabouts
from core.files import keep_until
from core.stopping import StopSignal
from core.training import distributed
from sft.examples import Example

METRICS = "metrics.jsonl"
LOGGED = {
    "loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
}  # fmt: skip
"""What the trainer logs of a step -> its name in metrics.jsonl."""
NOT_FINITE = "Nothing of this policy is saved. Lower sft.optim.lr, or set engine.dtype=float32"


class Record(TrainerCallback):
    """Writes `metrics.jsonl` and TensorBoard, from the first rank only.

    Args:
        out: folder of the stage.
        total: optimiser steps in all.
        of_epoch: optimiser steps of an epoch.
        val: held-out examples, whose NLL is measured before the first step and after each epoch.
    """

    def __init__(self, out: Path, *, total: int, of_epoch: int, val: list[Example], micro_batch: int):
        self._file, self._total, self._of_epoch = out / METRICS, total, of_epoch
        self._val, self._micro_batch, self._stop = val, micro_batch, StopSignal()
        self._held_out: float | None = None
        self._writer: SummaryWriter | None = None
        self._bar: tqdm | None = None
        self.trainer: Any = None
        """Set by whoever makes both."""
        self.stopped = ""
        """Who has received SIGTERM, in words; empty where nobody has."""

    def on_train_begin(self, args, state, control, **_):
        if distributed.rank() == 0:
            if state.global_step == 0:
                self._file.unlink(missing_ok=True)
            keep_until(self._file, state.global_step)
            self._writer = SummaryWriter(self._file.parent / "tensorboard", purge_step=state.global_step + 1)
            self._bar = tqdm(desc="sft", unit="step", initial=state.global_step, total=self._total)
        if state.global_step == 0 and self._val:
            whereabouts.enter("measure", 0)
            self._write(0, {"nll_held_out": self.trainer.nll(self._val, self._micro_batch)})

    def on_step_begin(self, args, state, control, **_):
        whereabouts.enter("train", state.global_step + 1)

    def on_step_end(self, args, state, control, **_):
        step = state.global_step
        if step == self._total:
            control.should_save = False  # the policy itself is saved next
        elif who := self._stop.requested():
            self.stopped, control.should_save, control.should_training_stop = who, True, True
        if self._val and step % self._of_epoch == 0:
            whereabouts.enter("measure", step)
            self._held_out = self.trainer.nll(self._val, self._micro_batch)
        return control

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs:  # the summary at the end
            return
        step = state.global_step
        row = {name: float(logs[key]) for key, name in LOGGED.items() if logs.get(key) is not None}
        finite = {f"values of {name}": [row[name]] for name in ("loss", "grad_norm") if name in row}
        distributed.check_finite(f"sft, step {step}", finite, NOT_FINITE)
        if self._held_out is not None:
            row["nll_held_out"], self._held_out = self._held_out, None
        self._write(step, row)
        if self._bar:
            self._bar.update()

    def on_train_end(self, args, state, control, **_):
        if self._writer:
            self._writer.close()
        if self._bar:
            self._bar.close()

    def _write(self, step: int, row: dict[str, float]) -> None:
        if self._writer is None:
            return
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        for name, value in row.items():
            self._writer.add_scalar(f"sft/{name}", value, step)
        self._writer.flush()


def silence(trainer: Any) -> None:
    """Without the trainer's own lines on the console."""
    trainer.remove_callback(PrinterCallback)
