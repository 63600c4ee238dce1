"""Which prompts the steps of a run sample."""

import random

import pytest

from core.data.streams import stream_seed
from ppo import sampling
from ppo.sampling import prompts_of_step

ROWS = [{"prompt_id": str(i)} for i in range(7)]


def drawn(seed: int) -> list[str]:
    """14 steps of 4 prompts: 8 epochs over 7 prompts."""
    return [row["prompt_id"] for step in range(1, 15) for row in prompts_of_step(ROWS, step, 4, seed)]


def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own():
    order = drawn(seed=3)
    epochs = [order[i : i + 7] for i in range(0, len(order), 7)]
    assert all(sorted(epoch) == sorted(row["prompt_id"] for row in ROWS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order == drawn(seed=3) != drawn(seed=4)


@pytest.mark.parametrize(("prompts", "count"), [(7, 4), (5, 5), (3, 11), (1, 2)])
def test_an_epoch_is_a_shuffle_named_by_its_number(prompts, count):
    """Written out: runs that are finished can be made again."""
    rows = [{"prompt_id": str(i)} for i in range(prompts)]
    for step in range(1, 6):
        expected = []
        for position in range((step - 1) * count, step * count):
            rng = random.Random(stream_seed(3, "ppo", "prompts", position // prompts))
            expected.append(rng.sample(range(prompts), prompts)[position % prompts])
        assert prompts_of_step(rows, step, count, 3) == [rows[i] for i in expected]


def test_an_epoch_is_shuffled_once():
    sampling._epoch_order.cache_clear()
    rows = [{"prompt_id": str(i)} for i in range(100)]
    for step in range(1, 8):  # 210 prompts: three epochs
        prompts_of_step(rows, step, 30, 3)
    assert sampling._epoch_order.cache_info().misses == 3
