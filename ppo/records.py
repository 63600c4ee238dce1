"""What passes between the phases of a PPO step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.generation.local import Completion
from core.models.layers import FrozenStates


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
