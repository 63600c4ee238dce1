"""The training pairs of an arm."""

import numpy as np
import pytest

from core.config import RewardVariant
from rm.train import arm_rows


def test_arms_of_one_size_share_their_wrong_labels():
    rows = [
        {"prompt_id": str(i), "chosen": "a", "rejected": "b", "flipped": i == 0, "pair_id": str(i),
         "weight": 1.0, "gold_chosen": 1.0, "gold_rejected": 0.0} for i in range(200)
    ]  # fmt: skip
    arms = [RewardVariant(pairs=100, label_noise=0.25, seed=s) for s in (0, 1)]
    first, second = (arm_rows(rows, arm, 1) for arm in arms)
    assert first == second and len(first) == 100
    changed = np.array([a["chosen"] != b["chosen"] for a, b in zip(first, rows, strict=False)])
    assert changed.sum() == 25
    assert all(a["flipped"] == (b["flipped"] != c) for a, b, c in zip(first, rows, changed, strict=False))
    assert arm_rows(rows, RewardVariant(), 1) == rows
    with pytest.raises(Exception, match="is 300 and there are only 200 training pairs"):
        arm_rows(rows, RewardVariant(pairs=300), 1)


def test_copies_of_a_weighted_pair_keep_one_label():
    rows = [{"pair_id": str(i), "chosen": "a", "rejected": "b", "flipped": False, "gold_chosen": None,
             "gold_rejected": None, "weight": 2.0} for i in range(100)]  # fmt: skip
    found = arm_rows(rows, RewardVariant(pairs=50, label_noise=0.2), 1)
    assert len(found) == 100 and len({r["pair_id"] for r in found}) == 50
    assert len({(r["pair_id"], r["flipped"]) for r in found}) == 50 and sum(r["flipped"] for r in found) == 20
