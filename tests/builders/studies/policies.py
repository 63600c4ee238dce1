"""Policies along training whose gold, proxy and KL are planted."""

from __future__ import annotations

import numpy as np

from study.analysis.policies import Measured
from study.analysis.pooled import Group
from study.design import Condition

KLS = (0.0, 0.5, 2.0, 4.5, 8.0, 12.5, 18.0, 24.5, 32.0)
"""Even in sqrt(KL), as training without a penalty gives them."""


def policies(
    rng: np.random.Generator,
    condition: str,
    *,
    alpha: float = 0.5,
    beta: float = 0.1,
    seeds: int = 3,
    prompts: int = 60,
    of_seeds: float = 0.05,
    gains: np.ndarray | None = None,
    bends: float = 0.0,
) -> Group:
    """Gold d (a - b d) of seeds with a ~ N(alpha, of_seeds) and b ~ N(beta, bends), and a proxy that rises by d.

    Prompts differ in how much they gain, and in their KL, which goes with what they gain; a seed's training is faster
    or slower by up to a fifth.

    Args:
        gains: by how much more prompts gain than others, [prompts]; drawn where it is not given.
    """
    runs = []
    gains = 0.3 * rng.normal(size=prompts) if gains is None else gains
    spread = np.exp(0.4 * rng.normal(size=prompts) + 0.5 * gains)
    spread /= np.exp(0.5 * (0.4**2 + 0.15**2))  # their mean over all prompts is 1
    for seed in range(seeds):
        true = np.array(KLS) * rng.uniform(0.8, 1.2)
        d = np.sqrt(true)
        a, b = alpha + of_seeds * rng.normal(), beta + bends * rng.normal()
        gold = d * (a - b * d) + np.outer(gains, d) + 0.5 * rng.normal(size=(prompts, len(d)))
        proxy = d + 0.3 * rng.normal(size=(prompts, len(d)))
        kl = true * spread[:, None] * np.exp(0.05 * rng.normal(size=(prompts, len(d))))
        runs.append(
            Measured(
                f"{condition}-seed{seed}", 8 * np.arange(len(d)), [f"p{i:03d}" for i in range(prompts)],
                {"proxy": proxy, "gold": gold}, kl, "rb", 1,
            )
        )  # fmt: skip
    return Group(f"{condition}-kl0", Condition(condition), 0.0, tuple(runs), tuple(range(seeds)))
