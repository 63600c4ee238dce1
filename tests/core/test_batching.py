"""Rows divided into micro-batches."""

import random

import pytest

from core.batching import balanced, by_length, by_length_on_ranks


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


@pytest.mark.parametrize("longest_first", [False, True])
def test_batches_by_length_fill_the_budget_and_never_exceed_it(longest_first):
    rng = random.Random(0)
    lengths = [rng.randint(1, 40) for _ in range(200)] + [500]
    batches = by_length(lengths, 100, longest_first=longest_first)
    assert sorted(i for batch in batches for i in batch) == list(range(201))
    padded = lambda rows: len(rows) * max(lengths[i] for i in rows)  # noqa: E731
    assert [batch for batch in batches if padded(batch) > 100] == [[200]]  # a row that is longer than the budget
    assert all(padded([*batch, after[0]]) > 100 for batch, after in zip(batches, batches[1:], strict=False))
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(lengths, reverse=longest_first)


def test_rows_of_one_length_keep_their_order():
    assert by_length([2, 2, 2], 4) == by_length([2, 2, 2], 4, longest_first=True) == [[0, 1], [2]]
    assert by_length([], 4) == []


@pytest.mark.parametrize(("rows", "budget"), [(64, 10**6), (64, 700), (9, 200)])
def test_ranks_share_the_rows_evenly(rows, budget):
    """Also where one batch would hold all rows, which every rank computed once."""
    rng = random.Random(rows)
    lengths = [rng.randint(30, 60) for _ in range(rows)]
    groups = by_length_on_ranks(lengths, budget, 2)
    assert sorted(i for group in groups for i in group) == list(range(rows)) and len(groups) % 2 == 0
    size = lambda group: len(group) * max(lengths[i] for i in group)  # noqa: E731
    assert all(size(group) <= budget for group in groups)
    of_ranks = [sum(map(size, groups[rank::2])) for rank in range(2)]
    assert max(of_ranks) < 1.4 * min(of_ranks)
    assert by_length_on_ranks(lengths, budget, 1) == by_length(lengths, budget, longest_first=True)


def test_ranks_without_rows_of_their_own_repeat_one():
    assert by_length_on_ranks([5], 100, 2) == [[0], [0]] and by_length_on_ranks([], 100, 2) == []
    assert by_length_on_ranks([4, 6, 8], 8, 2) == [[2], [1], [0], [0]]
