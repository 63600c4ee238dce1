"""Label noise: pairs labelled the wrong way round, at a rate and from a seed."""

from __future__ import annotations

import math

import numpy as np

from core.data.streams import unit_interval


def flip_labels(pairs: list[dict], rate: float, rng: np.random.Generator) -> list[dict]:
    """The pairs with exactly floor(N * rate) of them, drawn uniformly, labelled the wrong way round."""
    # The product of a decimal rate can fall just short of an integer: 100 * 0.29 is 28.999999999999996.
    count = int(np.floor(len(pairs) * rate + 1e-9))
    wrong = set(rng.choice(len(pairs), size=count, replace=False).tolist())
    return [_swapped(pair) if i in wrong else pair for i, pair in enumerate(pairs)]


def _swapped(pair: dict) -> dict:
    other = {"chosen": pair["rejected"], "rejected": pair["chosen"], "flipped": not pair["flipped"]}
    return pair | other | {"gold_chosen": pair["gold_rejected"], "gold_rejected": pair["gold_chosen"]}


def repeated(rows: list[dict]) -> list[dict]:
    """The rows as often as their weight says; of its fraction, the share of pairs that a hash of their id gives."""
    found = []
    for row in rows:
        whole = math.floor(row["weight"])
        extra = unit_interval(row["pair_id"], salt="weight") < row["weight"] - whole
        found += [row] * (whole + extra)
    return found
