"""What is done to labelled pairs before training: label noise, and repetition by weight."""

from __future__ import annotations

import math

import numpy as np

from core.data.rows import PairRow
from core.data.streams import unit_interval


def flip_labels(pairs: list[PairRow], rate: float, rng: np.random.Generator) -> list[PairRow]:
    """The pairs, with the labels of exactly floor(N * rate) of them flipped, which are drawn uniformly."""
    # The product of a decimal rate can fall just short of an integer: 100 * 0.29 is 28.999999999999996.
    count = int(np.floor(len(pairs) * rate + 1e-9))
    wrong = set(rng.choice(len(pairs), size=count, replace=False).tolist())
    return [_swapped(pair) if i in wrong else pair for i, pair in enumerate(pairs)]


def _swapped(pair: PairRow) -> PairRow:
    swapped: PairRow = {
        **pair,
        "chosen": pair["rejected"],
        "rejected": pair["chosen"],
        "flipped": not pair["flipped"],
        "gold_chosen": pair["gold_rejected"],
        "gold_rejected": pair["gold_chosen"],
    }
    if "chosen_ids" in pair and "rejected_ids" in pair:
        swapped |= {"chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]}
    return swapped


def repeated(rows: list[PairRow]) -> list[PairRow]:
    """Each row as often as its weight. A weight of 2.3 is 2 times, and a third time for 30% of the pairs, by hash."""
    result = []
    for row in rows:
        whole = math.floor(row["weight"])
        extra = unit_interval(row["pair_id"], salt="weight") < row["weight"] - whole
        result += [row] * (whole + extra)
    return result
