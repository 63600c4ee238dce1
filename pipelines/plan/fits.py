"""Fits of measured seconds: non-negative combinations of what is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

ROUNDS = 5
"""Of fitting again with less weight on the points that stand out."""


def non_negative(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients k >= 0 [n] that bring `features` [m, n] k close to the seconds, in relative error.

    Other work on a machine makes a call slower and never faster. So points that took longer than the fit says lose
    weight, and the fit is made again.
    """
    x, y = np.asarray(features, dtype=float), np.asarray(seconds, dtype=float)
    x, weights = x / y[:, None], np.ones(len(y))
    for _ in range(ROUNDS):
        k = _least_squares(x, weights)
        weights = np.clip((x @ k) ** 3, 0.05, 1.0)
    return k.tolist()


def _least_squares(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """k >= 0 with the smallest weighted squares of x k - 1.

    With the few features that there are here, every subset is tried; the best one without a negative coefficient wins.
    """
    best, found = float(weights.sum()), np.zeros(x.shape[1])
    root = np.sqrt(weights)[:, None]
    for size in range(1, min(x.shape) + 1):
        for columns in combinations(range(x.shape[1]), size):
            part = x[:, columns] * root
            scale = np.abs(part).max(axis=0)
            if (scale == 0).any():
                continue
            k = np.linalg.lstsq(part / scale, root[:, 0], rcond=None)[0] / scale
            error = float(np.square(part @ k - root[:, 0]).sum())
            if (k >= 0).all() and error < best * (1 - 1e-6):
                best, found = error, np.zeros(x.shape[1])
                found[list(columns)] = k
    return found


def pass_features(tokens: float, length: float, layers: float) -> list[float]:
    """A call costs something by itself, something per layer (a gather, kernels), and per token and layer: linear maps,
    and attention, which grows with the row's length."""
    return [1.0, layers, layers * tokens, layers * tokens * length]


def fit_passes(points: Sequence[Mapping[str, Any]]) -> list[float]:
    """Coefficients for `pass_features`.

    Args:
        points: rows, length, layers and seconds of calls. With one number of layers only, what a call costs is taken to
            be per layer.
    """
    features = [pass_features(p["rows"] * p["length"], p["length"], p["layers"]) for p in points]
    if len({p["layers"] for p in points}) == 1:
        features = [[0.0, *rest] for _, *rest in features]
    return non_negative(features, [p["seconds"] for p in points])


def predicted(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return sum(k * x for k, x in zip(coefficients, features, strict=True))
