"""How the rows of a rollout are divided: minibatches are random draws, micro-batches are balanced."""

import random

import numpy as np
import pytest

from core.generation.local import Completion
from ppo.records import make_minibatches

ROWS, RANKS, MINIBATCHES, LIMIT = 64, 2, 4, 48


def responses(rng: random.Random, rows: int) -> list[Completion]:
    """Lengths that spread as those of a chat model do; the limit cuts about three in four off."""
    lengths = [min(LIMIT, max(1, round(rng.lognormvariate(4.2, 0.7)))) for _ in range(rows)]
    return [Completion([7] * n, [-1.0] * n, "", n < LIMIT) for n in lengths]


def divide(completions: list[Completion], seed: int, micro_batch: int = 4, minibatches: int = MINIBATCHES):
    rows = len(completions)
    return make_minibatches(
        [[5] * (1 + i) for i in range(rows)], completions, list(range(rows)), 0,
        minibatches=minibatches, micro_batch=micro_batch, seed=seed,
    )  # fmt: skip


def test_every_row_is_in_one_micro_batch_with_what_belongs_to_it():
    completions = responses(random.Random(1), 32)
    found = divide(completions, seed=3)
    assert [[len(minibatch), sum(len(m.group) for m in minibatch)] for minibatch in found] == [[2, 8]] * MINIBATCHES
    seen = []
    for m in (m for minibatch in found for m in minibatch):
        for b, i in enumerate(m.group.tolist()):
            tokens = len(completions[i].token_ids)
            assert m.is_response[b].nonzero().flatten().tolist() == list(range(i, i + tokens))  # behind 1 + i of prompt
            assert (int(m.rows[b]), bool(m.finished[b])) == (i, completions[i].finished)
            seen.append(i)
    assert sorted(seen) == list(range(32))
    again, other = divide(completions, seed=3), divide(completions, seed=4)
    assert [m.group.tolist() for m in again[0]] == [m.group.tolist() for m in found[0]]
    assert [m.group.tolist() for m in other[0]] != [m.group.tolist() for m in found[0]]


def test_minibatches_are_random_draws_of_the_rollout():
    """Share of finished responses, and mean length: as far from those of the rollout as draws without replacement are.

    Minibatches that are made of micro-batches, which hold rows of one length, are some six times as far.
    """
    rng, size = random.Random(0), ROWS // MINIBATCHES
    ratios = []
    for step in range(60):
        parts = [[] for _ in range(MINIBATCHES)]
        for rank in range(RANKS):
            found = divide(responses(rng, ROWS // RANKS), seed=100 * step + rank)
            for part, minibatch in zip(parts, found, strict=True):
                for m in minibatch:
                    part += zip(m.finished.tolist(), m.is_response.sum(-1).tolist(), strict=True)
        rows = np.array(parts, dtype=float)  # [minibatches, rows, 2]
        # Each rank draws from its own rows, so only the spread within ranks counts; those of 32 rows differ little.
        spread = rows.mean(1).var(0, ddof=1)
        ratios.append(spread / (rows.reshape(-1, 2).var(0, ddof=1) / size))
    assert np.mean(ratios, axis=0) == pytest.approx([1.0, 1.0], abs=0.3)


def test_rows_that_do_not_divide_are_refused():
    completions = responses(random.Random(1), 10)
    with pytest.raises(ValueError, match=r"responses of a rank by ppo.minibatches: 10 is not divisible by 4"):
        divide(completions, seed=0)
    with pytest.raises(ValueError, match=r"by ppo.micro_batch: 5 is not divisible by 4"):
        divide(completions, seed=0, minibatches=2)
