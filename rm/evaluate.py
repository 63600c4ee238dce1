"""Accuracy of a reward model on pairs, with its interval."""

from __future__ import annotations

import math

import numpy as np


def pair_accuracy(preferred: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n] 1 where the preferred response has the higher reward, 0 where the lower, 1/2 on a tie."""
    return (preferred > other) + 0.5 * (preferred == other)


def accuracy_with_interval(hits: np.ndarray, z: float = 1.96) -> dict[str, float]:
    """Mean and Wilson score interval (95% at z = 1.96) of hits [n] in {0, 1/2, 1}."""
    n, p = len(hits), float(np.mean(hits))
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"mean": p, "lo": center - half, "hi": center + half, "n": n}
