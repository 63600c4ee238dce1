"""Which prompts a step samples responses to."""

from __future__ import annotations

import random
from functools import lru_cache

from core.data.rows import PromptRow
from core.data.streams import stream_seed
from core.training import distributed


def prompts_of_step(rows: list[PromptRow], step: int, count: int, seed: int) -> list[PromptRow]:
    """This rank's share of the `count` prompts of `step` (from 1).

    Steps walk through `rows` epoch by epoch without replacement, each epoch in an order of its own. `count` is a
    multiple of the number of ranks.
    """
    return of_rank(all_prompts_of_step(rows, step, count, seed))


def all_prompts_of_step(rows: list[PromptRow], step: int, count: int, seed: int) -> list[PromptRow]:
    """As `prompts_of_step`, of all ranks."""
    first = (step - 1) * count
    chosen = []
    for position in range(first, first + count):
        epoch, index = divmod(position, len(rows))
        chosen.append(rows[_epoch_order(len(rows), seed, epoch)[index]])
    return chosen


def of_rank(rows: list[PromptRow]) -> list[PromptRow]:
    """This rank's share of rows that all ranks have."""
    mine = len(rows) // distributed.world_size()
    return rows[distributed.rank() * mine : (distributed.rank() + 1) * mine]


@lru_cache(maxsize=2)  # a step that ends an epoch begins the next one
def _epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(stream_seed(seed, "ppo", "prompts", epoch)).sample(range(n), n)
