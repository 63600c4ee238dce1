"""What is measured of a trained reward model: held-out pairs, and its mean and SD on samples of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from core.data.rows import CalibrationRow, HeldOutRow, PairRow, ResponseRow
from core.errors import DataError
from core.files import write_table
from core.models.state_cache import FrozenStateCache
from core.training import distributed
from core.training.engine import Engine
from rm.evaluation.intervals import accuracy_with_interval
from rm.evaluation.metrics import pair_accuracy
from rm.model import RewardModel
from rm.pairs import SIDES, as_response
from rm.reading import Reader, Tokens
from rm.score import score_tokens


def measure(
    engine: Engine,
    model: RewardModel,
    val: list[PairRow],
    calibration: list[CalibrationRow],
    out: Path,
    cache: FrozenStateCache | None = None,
) -> dict:
    """Measure held-out accuracy, and the model's mean and SD on samples of the reference policy, which it sets.

    Rewards of the validation pairs are written to `out/val.parquet`.

    Args:
        val: rows of pairs.parquet.
        calibration: rows of calibration.parquet.

    Returns:
        Accuracies against gold and against the labels, with intervals; mean and SD of the reward; its correlation with
        the number of words; and how many pairs were left out because the model has fewer positions than they tokens.

    Raises:
        DataError: all validation pairs are too long, or a calibration sample is.
    """
    reader = model.reader
    val, tokens, too_long = held_out(reader, val, model.positions)
    tokens += [reader.row(cast(ResponseRow, r)) for r in calibration]
    rewards = score_tokens(
        engine, model.tokenizer, tokens, limits=model.limits, together=True, frozen=cache,
        device=distributed.device(), progress="rm: validation",
    ).tolist()  # fmt: skip
    n = len(val)
    chosen, rejected, sampled = np.array(rewards[:n]), np.array(rewards[n : 2 * n]), np.array(rewards[2 * n :])
    model.mean, model.std = float(sampled.mean()), float(sampled.std(ddof=1))
    sign = np.where([r["flipped"] for r in val], -1.0, 1.0)
    if distributed.rank() == 0:
        rows = [
            {
                "prompt_id": r["prompt_id"],
                "pair_id": r["pair_id"],
                "reward_chosen": c,
                "reward_rejected": j,
                "flipped": r["flipped"],
            }
            for r, c, j in zip(val, chosen.tolist(), rejected.tolist(), strict=True)
        ]
        write_table(out / "val.parquet", rows, HeldOutRow)
    words = [len(r["response"].split()) for r in calibration]
    return {
        "accuracy_gold": accuracy_with_interval(pair_accuracy(sign * chosen, sign * rejected)),
        "accuracy_label": accuracy_with_interval(pair_accuracy(chosen, rejected)),
        "reward_mean": model.mean,
        "reward_std": model.std,
        "length_correlation": float(np.corrcoef(sampled, words)[0, 1]),
        "val_too_long": too_long,
    }


def held_out(reader: Reader, val: list[PairRow], positions: int) -> tuple[list[PairRow], list[Tokens], int]:
    """The validation pairs that a model of so many positions can read; the tokens of all their chosen responses, then
    of all their rejected ones; and how many pairs were left out.

    Raises:
        DataError: all of them are too long.
    """
    pairs = [(row, [reader.row(as_response(row, side)) for side in SIDES]) for row in val]
    fitting = [(row, sides) for row, sides in pairs if max(len(p) + len(r) for p, r in sides) <= positions]
    if not fitting:
        raise DataError(f"all {len(val)} validation pairs have more tokens than the {positions} positions of the model")
    tokens = [sides[i] for i in range(len(SIDES)) for _, sides in fitting]
    return [row for row, _ in fitting], tokens, len(pairs) - len(fitting)
