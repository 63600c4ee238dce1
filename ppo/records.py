"""What passes between the phases of a PPO step: sampled responses, micro-batches, the rollout."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.batching import balanced, pad_right
from core.config import exact_div
from core.data.rows import PromptRow, ResponseRow
from core.errors import DataError
from core.generation.local import Completion
from core.models.layers import FrozenStates
from core.training import distributed


@dataclass(slots=True)
class Micro:
    """One micro-batch of a rollout, B responses in rows of L columns.

    Tensors are [B, L-1] unless a comment gives another shape: column t is about predicting token t+1. The fields that
    the constructor does not take are filled in after sampling: what models give by `ppo.rollout`, values, advantages
    and returns by `ppo.update`. The same rows in the same shape serve for the old log-probs and for every update, so
    that the first ratio is 1.
    """

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    is_response: Tensor  # bool, True on response tokens, the end of turn included
    sampler_logprobs: Tensor  # nats, by vLLM
    finished: Tensor  # [B] bool, False where max_new_tokens cut the response off
    group: Tensor  # [B], equal for responses to one prompt
    rows: Tensor  # [B], the number of each response among those of the rank, in the order in which they were sampled
    proxy: Tensor = field(init=False)  # [B], raw rewards
    reward: Tensor = field(init=False)  # [B], what PPO optimises, without the KL penalty
    logprobs: Tensor = field(init=False)  # nats, by the actor before the updates
    ref_logprobs: Tensor = field(init=False)  # nats, by the reference
    critic_outputs: Tensor = field(init=False)  # by the critic before the updates, in units of its head
    values: Tensor = field(init=False)  # the same in units of the normalised reward
    advantages: Tensor = field(init=False)
    returns: Tensor = field(init=False)
    is_weight: Tensor | None = None  # of `ppo.methods.correction`; None: no correction
    frozen: FrozenStates | None = None  # of the frozen layers that several models share
    prompt_ids: tuple[str, ...] = ()  # [B], for messages

    @property
    def reads(self) -> Tensor:
        return positions_read(self.is_response)


def positions_read(is_response: Tensor) -> Tensor:
    """Where the critic is read: indices [number of response tokens] into the flattened [B * L] of the states before
    each response token, from `is_response` [B, L-1]."""
    return torch.nn.functional.pad(is_response, (0, 1)).flatten().nonzero().squeeze(-1)


def make_micros(
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    groups: Sequence[int],
    pad_id: int,
    count: int,
    chosen: Sequence[int] | None = None,
) -> list[Micro]:
    """`count` micro-batches of rows of similar length, whose padded sizes are as equal as can be.

    The number of micro-batches is fixed, not a budget of tokens, since all ranks must make equally many passes.

    Args:
        prompts: token ids of the prompt of each response.
        groups: [n], equal for responses to one prompt.
        chosen: numbers of the responses that are to be in them; None for all.

    Raises:
        DataError: a response of no token at all.
    """
    chosen = range(len(completions)) if chosen is None else chosen
    if empty := sum(not completions[i].token_ids for i in chosen):
        raise DataError(f"vLLM returned no token at all for {empty} prompts; is max_new_tokens at least 1?")
    rows_of = balanced([len(prompts[i]) + len(completions[i].token_ids) for i in chosen], count)
    return [_micro(prompts, completions, groups, pad_id, [chosen[k] for k in part]) for part in rows_of]


def _micro(
    prompts: Sequence[list[int]], completions: Sequence[Completion], groups: Sequence[int], pad_id: int, rows: list[int]
) -> Micro:
    ids, mask = pad_right([prompts[i] + completions[i].token_ids for i in rows], pad_id, distributed.device())
    is_response = torch.zeros_like(ids, dtype=torch.bool)[:, 1:]
    sampler = torch.zeros(is_response.shape, device=ids.device)
    for b, i in enumerate(rows):
        span = slice(len(prompts[i]) - 1, len(prompts[i]) - 1 + len(completions[i].token_ids))
        is_response[b, span] = True
        sampler[b, span] = torch.tensor(completions[i].logprobs)
    finished = torch.tensor([completions[i].finished for i in rows], device=ids.device)
    group = torch.tensor([groups[i] for i in rows], device=ids.device)
    return Micro(ids, mask, is_response, sampler, finished, group, torch.tensor(rows, device=ids.device))


def make_minibatches(
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    groups: Sequence[int],
    pad_id: int,
    *,
    minibatches: int,
    micro_batch: int,
    seed: int,
) -> list[list[Micro]]:
    """Equally large minibatches of rows drawn at random, each of equally many micro-batches as `make_micros` makes.

    Rows go to minibatches first, so that each of them is a random draw of the rollout: were they made of micro-batches,
    which hold rows of similar length, each optimiser step would see responses of one length. The responses to a prompt
    need not stay together, since their advantages are computed before.

    Args:
        prompts, completions, groups, pad_id: as in `make_micros`.
        micro_batch: rows of a micro-batch, on average.
        seed: of the draw; another one on each rank.

    Raises:
        DataError: a response of no token at all.
        ValueError: the rows do not divide into minibatches and micro-batches.
    """
    size = exact_div(len(completions), minibatches, "responses of a rank by ppo.minibatches")
    count = exact_div(size, micro_batch, "responses of a minibatch on a rank by ppo.micro_batch")
    order = random.Random(seed).sample(range(len(completions)), len(completions))
    return [
        make_micros(prompts, completions, groups, pad_id, count, order[start : start + size])
        for start in range(0, len(order), size)
    ]


@dataclass
class Rollout:
    """One step's responses on this rank, in minibatches, and how long each phase of collecting them took."""

    minibatches: list[list[Micro]]
    """The micro-batches of each minibatch."""
    samples: list[dict]
    """One for each response, by its number: rows of the rollout's table, which `ppo.measured.rollouts` completes."""
    policy: int
    """The step whose weights sampled it, the earliest one of all ranks; 0 is the reference."""
    behind: int
    """How many steps older than the actor's the weights of `policy` are: 0 without ppo.overlap."""
    of_one_policy: bool = True
    """Whether that policy sampled it on all ranks."""
    responses: list[ResponseRow] = field(default_factory=list)
    """What the proxy has read, one row for each response."""
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    """Metrics of how the responses were found, equal on all ranks."""

    @property
    def micros(self) -> list[Micro]:
        """All micro-batches."""
        return [micro for minibatch in self.minibatches for micro in minibatch]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's responses on this rank, as vLLM returned them; all lists are [n], one entry per response."""

    rows: list[PromptRow]  # of the prompts
    prompts: list[list[int]]  # token ids of the prompts
    policy: int  # the step whose weights sampled them, or their first tokens; 0 is the reference
    groups: list[int]  # equal for responses to one prompt
    completions: list[Completion]
    carried: bool = False  # newer weights arrived while they were sampled


class Clock:
    """Wall-clock seconds per phase, from the construction on."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last call towards `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
