"""AdamW as the configuration has it, and updates that are left out: with gradients that are not finite, and, by option,
spikes of the gradient."""

from __future__ import annotations

import math
import statistics
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from core.config import Optim

WINDOW = 128
"""Gradient norms that a new one is compared with, as in OLMo-core."""
FEWEST = 16
"""Norms that must be known before an update is left out. OLMo-core waits for 64, half of its window: more updates than
many runs here have."""


def adamw(parameters: Iterable[nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """The optimiser of every stage that trains: one learning rate and one decay for all parameters."""
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


class Spikes:
    """Which gradient norms are spikes, by the rule of OLMo 2 (arXiv 2501.00656; `SkipStepOptimizer` of OLMo-core).

    A norm is a spike if it is more than `deviations` standard deviations above the mean of the last `WINDOW` norms,
    spikes among them: a norm that stays at another level is soon no spike any more. OLMo-core judges losses too. The
    losses of PPO are no measure of that, since each rollout has its own.

    Args:
        deviations: None for no spikes.

    Attributes:
        skipped: updates that were left out so far.
    """

    def __init__(self, deviations: float | None):
        self._deviations, self._norms = deviations, deque[float](maxlen=WINDOW)
        self.skipped = 0

    def is_spike(self, norm: float) -> bool:
        if self._deviations is None or len(self._norms) < FEWEST:
            return False
        return norm - statistics.fmean(self._norms) > self._deviations * statistics.stdev(self._norms)

    def add(self, norm: float) -> None:
        """Count the norm of an update that was made or left out."""
        self.skipped += self.is_spike(norm)
        if math.isfinite(norm):
            self._norms.append(norm)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._norms.clear()
        self._norms.extend(state["norms"])
        self.skipped = state["skipped"]


def guard(optimizer: torch.optim.Optimizer, may_step: Callable[[], bool]) -> None:
    """Let an optimiser leave weights and its own state as they are where it may not step.

    DeepSpeed calls `step` when it knows the norm of the whole gradient, at ZeRO-3 once for each group of weights. It
    asks for the type of an optimiser, so that a class of our own will not do.

    Args:
        may_step: asked before each step.
    """
    update = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        return update(closure) if may_step() else None

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
