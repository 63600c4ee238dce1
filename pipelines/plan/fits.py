"""Fits of measured seconds: non-negative combinations of what is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np


def non_negative(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients k >= 0 [n] that minimise the mean squared relative error of `features` [m, n] k.

    With the few features that there are here, every subset is tried; the best one without a negative coefficient wins.
    """
    x, y = np.asarray(features, dtype=float), np.asarray(seconds, dtype=float)
    x = x / y[:, None]
    best, found = float(len(y)), np.zeros(x.shape[1])
    for size in range(1, min(x.shape) + 1):
        for columns in combinations(range(x.shape[1]), size):
            part = x[:, columns]
            scale = np.abs(part).max(axis=0)
            if (scale == 0).any():
                continue
            k = np.linalg.lstsq(part / scale, np.ones(len(y)), rcond=None)[0] / scale
            error = float(np.square(part @ k - 1).sum())
            if (k >= 0).all() and error < best * (1 - 1e-6):
                best, found = error, np.zeros(x.shape[1])
                found[list(columns)] = k
    return found.tolist()


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
