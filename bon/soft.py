"""Soft best-of-n: one of n samples is drawn with probability proportional to exp(proxy / temperature).

It gives up some proxy for a smaller KL from the reference (Verdun et al. 2025, 2505.03156; Aminian et al. 2025,
2507.05913). Temperature 0 is best-of-n, infinite temperature is a plain sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bon.estimators import Array, best_of_n


def soft_best_of_n(
    proxy: Array, value: Array, ns: Sequence[int], temperature: float, *, draws: int = 32, seed: int = 0
) -> Array:
    """Expected `value` [P, K] of soft best-of-n; proxy and value [P, N].

    There is no closed form over all subsets, since each subset has its own normaliser. So each of `draws` permutations
    cuts a pool into N // n disjoint subsets, whose mean is unbiased and uses no sample twice. At temperature 0 the
    result is that of `best_of_n`.

    Raises:
        ValueError: a negative temperature, different shapes, or n outside 1..N.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 or more")
    if temperature == 0:
        return best_of_n(proxy, value, ns)
    best_of_n(proxy[:1], value[:1], ns)  # for its checks of shapes and ns
    proxy, value = np.asarray(proxy, dtype=float), np.asarray(value, dtype=float)
    P, N = proxy.shape
    result, rng = np.zeros((P, len(ns))), np.random.default_rng(seed)
    for _ in range(draws):
        order = rng.permuted(np.tile(np.arange(N), (P, 1)), axis=1)
        p, v = np.take_along_axis(proxy, order, 1) / temperature, np.take_along_axis(value, order, 1)
        for k, n in enumerate(ns):
            groups = N // n
            logits = p[:, : groups * n].reshape(P, groups, n)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            chosen = (weights * v[:, : groups * n].reshape(P, groups, n)).sum(-1) / weights.sum(-1)
            result[:, k] += chosen.mean(axis=1) / draws
    return result
