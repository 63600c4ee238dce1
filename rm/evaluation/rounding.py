"""How much of a result depends on rounding, where weights are not in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rm.evaluation.metrics import ComparisonRow
from rm.evaluation.sets import Comparison
from rm.model import RewardModel

PAIRS = 32
"""Comparisons that are scored twice."""


def rounding(model: RewardModel, comparisons: Sequence[Comparison], rows: Sequence[ComparisonRow]) -> dict:
    """Scores some comparisons again, each conversation by itself: in exact arithmetic nothing would change.

    Args:
        rows: of the same set, scored in batches.

    Returns:
        `pairs`, how many were scored again; `changed`, how many of them prefer another response now; and `rms`, the
        root mean square of the change of a reward.
    """
    of_id = {c.id: c for c in comparisons}
    again = [rows[i] for i in np.linspace(0, len(rows) - 1, min(PAIRS, len(rows))).astype(int)]
    batched = np.array([[row["reward_chosen"], row["reward_rejected"]] for row in again])
    alone = np.array([[float(model.score([chat])) for chat in _chats(of_id[row["id"]])] for row in again])
    prefers = [np.sign(rewards[:, 0] - rewards[:, 1]) for rewards in (batched, alone)]
    return {
        "pairs": len(again),
        "changed": int((prefers[0] != prefers[1]).sum()),
        "rms": float(np.sqrt(np.mean((alone - batched) ** 2))),
    }


def _chats(comparison: Comparison) -> tuple:
    return comparison.chosen, comparison.rejected
