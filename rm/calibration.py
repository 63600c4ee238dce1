"""Mean and standard deviation of a reward model's rewards on samples of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.data.rows import ResponseRow
from core.errors import ArtefactError
from core.files import read_table
from rm.model import RewardModel


def read_calibration(path: Path) -> list[ResponseRow]:
    """Rows of a `calibration.parquet`.

    Raises:
        ArtefactError: no such file, or it has no rows of this form.
    """
    if not path.is_file():
        raise ArtefactError(f"--calibrate {path}: no such file; give preferences/calibration.parquet of a run")
    rows = read_table(path, ResponseRow)
    if not isinstance(rows[0]["prompt"], list):
        raise ArtefactError(f"--calibrate {path}: a prompt must be a list of messages")
    return rows


def calibrate(model: RewardModel, rows: Sequence[ResponseRow], *, batch_tokens: int = 8192) -> tuple[float, float]:
    """Mean and standard deviation (with n - 1) of the model's rewards.

    Args:
        rows: `prompt` (messages) and `response` (text) of each sample, and its tokens if they are known.
        batch_tokens: as in `RewardModel.score`.

    Raises:
        ArtefactError: fewer than two rows, or rewards that are all equal.
    """
    if len(rows) < 2:
        raise ArtefactError(f"{len(rows)} samples have no standard deviation: calibrate on more of them")
    rewards = model.score_rows(rows, batch_tokens=batch_tokens, progress="calibration").double()
    if not (std := float(rewards.std())) > 0:
        raise ArtefactError(f"all {len(rows)} rewards are {float(rewards[0])}, so there is no scale to calibrate")
    return float(rewards.mean()), std
