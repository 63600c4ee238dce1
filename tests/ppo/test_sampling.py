"""Which prompts the steps of a run sample."""

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
