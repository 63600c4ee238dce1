"""Which prompts a step samples, and its responses."""

from __future__ import annotations

import random

from core.data.streams import stream_seed
from core.training import distributed
from ppo.records import Sampled


def prompts_of_step(rows: list[dict], step: int, count: int, seed: int) -> list[dict]:
    """`count` prompts for `step` (from 1): epochs without replacement, each reordered; this rank's share."""
    first = (step - 1) * count
    chosen = []
    for position in range(first, first + count):
        epoch, index = divmod(position, len(rows))
        chosen.append(_epoch_order(len(rows), seed, epoch)[index])
    mine = len(chosen) // distributed.world_size()
    return [rows[i] for i in chosen[distributed.rank() * mine : (distributed.rank() + 1) * mine]]


def _epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(stream_seed(seed, "ppo", "prompts", epoch)).sample(range(n), n)


def sample(trainer, step: int, policy: int) -> Sampled:
    """Sample with the weights that vLLM has now, those of step `policy`.

    `trainer` is ppo.train.Trainer, here and below.
    """
    ppo = trainer.cfg.ppo
    rows = prompts_of_step(trainer.prompts, step, ppo.prompts_per_step, trainer.seed)
    prompts = [trainer.generator.tokenizer.prompt_ids(row["prompt"]) for row in rows]
    seed = stream_seed(trainer.seed, "ppo", "rollout", step, distributed.rank())
    found = trainer.generator.generate(prompts, n=ppo.samples_per_prompt, seed=seed)
    owner = [i for i, group in enumerate(found) for _ in group]
    rows, prompts = ([of_prompt[i] for i in owner] for of_prompt in (rows, prompts))
    return Sampled(rows, prompts, policy, owner, [c for group in found for c in group])
