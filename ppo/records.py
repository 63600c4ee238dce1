"""What passes between the phases of a PPO step: sampled responses, micro-batches, the rollout."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.batching import balanced, pad_right
from core.errors import DataError
from core.generation.local import Completion
from core.models.layers import FrozenStates
from core.training import distributed


@dataclass(slots=True)
class Micro:
    """One micro-batch: the same rows in the same shape for old log-probs and every update, so the first ratio is 1.

    All tensors are [B, L-1]: column t speaks of predicting token t+1. `is_response` is True on response tokens,
    the end of turn included.
    """

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    is_response: Tensor
    sampler_logprobs: Tensor
    proxy: Tensor  # [B], raw reward
    finished: Tensor  # [B], False where cut off
    group: Tensor  # [B], equal for responses to one prompt
    logprobs: Tensor = None
    ref_logprobs: Tensor = None
    values: Tensor = None
    advantages: Tensor = None
    returns: Tensor = None
    is_weight: Tensor = None
    frozen: FrozenStates | None = None

    @property
    def reads(self) -> Tensor:
        """[R] into the flattened [B * L], where the critic is read: at the state before each response token."""
        return torch.nn.functional.pad(self.is_response, (0, 1)).flatten().nonzero().squeeze(-1)


def make_micros(
    prompts: list[list[int]],
    completions: list[Completion],
    rewards: Tensor,
    groups: list[int],
    pad_id: int,
    count: int,
) -> list[Micro]:
    """`count` micro-batches of rows of similar length, whose padded sizes are as equal as can be.

    The number of micro-batches is fixed, not a budget of tokens, since all ranks must make equally many passes.

    Args:
        prompts: token ids of the prompt of each response.
        rewards: [n] raw rewards of the proxy.
        groups: [n], equal for responses to one prompt.

    Raises:
        DataError: a response of no token at all.
    """
    if empty := sum(not c.token_ids for c in completions):
        raise DataError(f"vLLM returned no token at all for {empty} prompts; is max_new_tokens at least 1?")
    micros = []
    for rows in balanced([len(p) + len(c.token_ids) for p, c in zip(prompts, completions, strict=True)], count):
        ids, mask = pad_right([prompts[i] + completions[i].token_ids for i in rows], pad_id, distributed.device())
        is_response = torch.zeros_like(ids, dtype=torch.bool)[:, 1:]
        sampler = torch.zeros(is_response.shape, device=ids.device)
        for b, i in enumerate(rows):
            span = slice(len(prompts[i]) - 1, len(prompts[i]) - 1 + len(completions[i].token_ids))
            is_response[b, span] = True
            sampler[b, span] = torch.tensor(completions[i].logprobs)
        finished = torch.tensor([completions[i].finished for i in rows], device=ids.device)
        group = torch.tensor([groups[i] for i in rows], device=ids.device)
        micros.append(Micro(ids, mask, is_response, sampler, rewards[rows].to(ids.device), finished, group))
    return micros


@dataclass
class Rollout:
    """One step's responses on this rank, and how long each phase took."""

    micros: list[Micro]
    samples: list[dict]
    policy: int
    """The step whose weights sampled it."""
    behind: int
    """Steps between them and the actor's weights: 0, or 1 with ppo.overlap."""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's responses on this rank, as the sampler gave them; lists of one length."""

    rows: list[dict]  # the prompts
    prompts: list[list[int]]  # their token ids
    policy: int  # the step whose weights sampled them; 0 is the reference
    groups: list[int]  # equal for responses to one prompt
    completions: list[Completion]


class Clock:
    """Seconds per phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
