"""Dynamic sampling (DAPO, 2503.14476, section 3.2): a step trains on prompts whose samples differ in their reward.

Where all samples of a prompt have one reward, estimators that compare them give advantage 0, and the prompt teaches
nothing. Such prompts are replaced by others, which are sampled in further rounds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.data.rows import PromptRow
from core.data.streams import stream_seed
from core.training import distributed
from ppo.records import Sampled
from ppo.sampling import of_rank


@dataclass(frozen=True, slots=True)
class Scored:
    """This rank's responses of a round, k to each prompt, one prompt after the other, and their rewards."""

    sampled: Sampled
    rewards: Tensor
    """[n], what is optimised, before scale and penalties."""
    parts: Mapping[str, Tensor]
    """What they are the sum of, [n] each."""

    def varied(self, k: int) -> list[int]:
        """The numbers of the prompts whose k rewards differ."""
        of_prompts = self.rewards.view(-1, k)
        return (of_prompts.amax(1) > of_prompts.amin(1)).nonzero().flatten().tolist()


def chosen(rounds: list[Scored], k: int) -> Scored:
    """As many prompts as the first round has: those that differ in the order in which they were sampled, then, where
    they are too few, the first ones that do not."""
    count = len(rounds[0].rewards) // k
    differ = [(r, p) for r, scored in enumerate(rounds) for p in scored.varied(k)]
    others = [(0, p) for p in range(count) if (0, p) not in differ]
    places = [(r, p * k + i) for r, p in (differ + others)[:count] for i in range(k)]
    of = lambda name: [getattr(rounds[r].sampled, name)[i] for r, i in places]  # noqa: E731
    sampled = Sampled(
        of("rows"), of("prompts"), rounds[0].sampled.policy, [n // k for n in range(len(places))], of("completions")
    )
    rewards = torch.stack([rounds[r].rewards[i] for r, i in places])
    parts = {name: torch.stack([rounds[r].parts[name][i] for r, i in places]) for name in rounds[0].parts}
    return Scored(sampled, rewards, parts)


def is_enough(rounds: list[Scored], k: int) -> bool:
    """Whether each rank has as many prompts that differ as it needs. Every rank must call it."""
    lacking = len(rounds[0].rewards) // k - sum(len(scored.varied(k)) for scored in rounds)
    return distributed.global_max(lacking) <= 0


def facts(rounds: list[Scored], k: int) -> dict[str, float]:
    """Metrics over all ranks: `sampling_rounds`, and of the sampled prompts the share whose rewards differ."""
    differ = sum(len(scored.varied(k)) for scored in rounds)
    whole = sum(len(scored.rewards) // k for scored in rounds)
    differ_everywhere, everywhere = distributed.global_sum(differ, whole)
    return {"sampling_rounds": float(len(rounds)), "varied_share": differ_everywhere / everywhere}


def more_prompts(
    rows: list[PromptRow], used: set[str], step: int, number: int, count: int, seed: int
) -> list[PromptRow]:
    """This rank's share of the `count` prompts of a further round of a step; none where the prompts are used up.

    Args:
        used: ids of the prompts of the step's first round, on all ranks.
        number: of the round, from 1 for the second one.
        count: on all ranks.
    """
    rest = [row for row in rows if row["prompt_id"] not in used]
    order = random.Random(stream_seed(seed, "ppo", "more prompts", step)).sample(range(len(rest)), len(rest))
    places = order[(number - 1) * count : number * count]
    return of_rank([rest[i] for i in places]) if len(places) == count else []
