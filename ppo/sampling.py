"""Which prompts a step samples responses to, and what samples them."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

from core.config import Generation, Model, Ppo
from core.data.chat import ChatTokenizer
from core.data.rows import PromptRow
from core.data.streams import stream_seed
from core.generation.local import Generator
from core.generation.remote import ServerGenerator
from core.models.lora import named_targets
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


def make_generator(
    ppo: Ppo, policy: Model, generation: Generation, *, sync_folder: Path
) -> Generator | ServerGenerator:
    """vLLM in this process, or the servers; `sync_folder` is where servers read new weights from a file."""
    tokenizer = ChatTokenizer(policy)  # its own: with `ppo.overlap` another thread uses it
    if not ppo.vllm_servers:
        adapter = named_targets(policy, ppo.lora) if ppo.sync == "adapter" and ppo.lora else None
        return Generator(policy, generation, tokenizer, adapter=adapter)
    return ServerGenerator(
        ppo.vllm_servers, policy, generation, tokenizer,
        folder=sync_folder if ppo.weight_transfer == "file" else None, timeout=ppo.server_timeout,
        retries=ppo.server_retries, carry=ppo.partial_rollouts,
    )  # fmt: skip
