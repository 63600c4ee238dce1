"""Rows divided into micro-batches."""

import pytest

from core.batching import balanced


def test_balanced_micro_batches_hold_every_row_once():
    lengths = [5, 100, 7, 90, 6, 8, 60, 50]
    parts = balanced(lengths, 4)
    assert sorted(i for part in parts for i in part) == list(range(8)) and all(parts)
    best = min(  # all ways to cut the sorted lengths into four runs
        max(len(run) * max(run) for run in (ordered[:a], ordered[a:b], ordered[b:c], ordered[c:]))
        for ordered in [sorted(lengths)]
        for a in range(1, 6)
        for b in range(a + 1, 7)
        for c in range(b + 1, 8)
    )
    assert max(len(part) * max(lengths[i] for i in part) for part in parts) == best
    assert sorted(len(p) for p in balanced([3, 3], 2)) == [1, 1]
    with pytest.raises(ValueError, match="cannot fill 3"):
        balanced([1, 2], 3)
