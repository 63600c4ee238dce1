"""The one unit of over-optimisation: gains over the reference, in standard deviations within prompts."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from bon.estimators import Array


def gains(values: Array) -> Array:
    """Values [P, N] of a pool minus their prompt's mean, in the pooled standard deviation within prompts.

    Raises:
        ValueError: values that do not vary within any prompt.
    """
    unit = scale(values)
    if not unit > 0:
        raise ValueError("scores do not vary within any prompt: nothing can be selected by them")
    centred: Array = values - values.mean(axis=1, keepdims=True)
    return centred / unit


def scale(values: Array) -> float:
    """The pooled standard deviation of [P, N] within prompts, with P (N - 1) degrees of freedom."""
    P, N = values.shape
    centred = values - values.mean(axis=1, keepdims=True)
    return float(np.sqrt((centred**2).sum() / (P * (N - 1))))


def correlation(first: Array, second: Array) -> float | None:
    """Pearson's, of deviations from the prompt's mean, [P, N] pooled; None where one of the two does not vary."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (first, second))
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size else None


def normal_scores(values: Array) -> Array:
    """Values [P, N] as the normal quantiles of their ranks (k - 1/2) / N within the prompt; ties share a rank.

    Whatever keeps the order of the values, such as another scale, keeps these.
    """
    P, N = values.shape
    quantile = np.array([0.0] + [NormalDist().inv_cdf((k - 1) / (2 * N)) for k in range(2, 2 * N + 1)])
    scores = np.empty((P, N))
    for p in range(P):
        _, place, sizes = np.unique(values[p], return_inverse=True, return_counts=True)
        twice_rank = 2 * np.cumsum(sizes) - (sizes - 1)  # a whole number, for ties as well
        scores[p] = quantile[(twice_rank - 1)[place]]
    return scores
