"""The learning rate along a run."""

from __future__ import annotations

import math

from core.config import Optim


def factor(optim: Optim, step: int, total: int) -> float:
    """What the learning rate is multiplied by at optimiser step `step` (from 0) of `total`: linear warm-up, then the
    schedule."""
    warm = math.ceil(optim.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = min(1.0, (step - warm) / max(1, total - warm))
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        optim.schedule
    ]


def same_until(optim: Optim, step: int, first_total: int, second_total: int) -> bool:
    """Whether runs of two lengths have the same learning rates up to and including optimiser step `step`."""
    return all(factor(optim, s, first_total) == factor(optim, s, second_total) for s in range(step + 1))
