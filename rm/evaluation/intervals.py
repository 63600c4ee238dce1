"""95% intervals of accuracies and of their paired differences, over prompts that have one or several units each.

u units, G prompts ("clusters"). Percentiles of a bootstrap are too narrow where few prompts vary, and a point where
none does. There the score intervals stand in, which are inversions of a test and never a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Z95 = 1.96
FEW = 20
"""Fewer prompts than this that vary are too few for a bootstrap over prompts."""


def accuracy_with_interval(hits: np.ndarray, z: float = Z95, size: float | None = None) -> dict[str, float]:
    """Mean and Wilson score interval (95% for z = 1.96; Wilson 1927) of hits [n] in [0, 1].

    Args:
        size: number of independent observations that they are worth, by default n.
    """
    p, n = float(np.mean(hits)), len(hits) if size is None else size
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"mean": p, "lo": center - half, "hi": center + half, "n": len(hits)}


def mean_with_intervals(hits: Array, clusters: Sequence[str], *, draws: int, seed: int) -> dict:
    """Mean of the hits [u] that are not NaN, with its Wilson interval and one over clusters.

    `interval` names the interval that `lo` and `hi` are from. "wilson" takes units for independent, and is used where
    no cluster has several. Otherwise it is "cluster bootstrap", or "wilson over prompts" where all but a few clusters
    are right, or wrong, in everything: Wilson's, as if each cluster were one observation. All three are None if one
    cluster has all units.
    """
    kept = ~np.isnan(hits)
    names = [c for c, keep in zip(clusters, kept, strict=True) if keep]
    if not names:
        return {"mean": None, "lo": None, "hi": None, "n": 0, "clusters": 0, "interval": None, "wilson": None}
    hits = hits[kept]
    accuracy: dict = accuracy_with_interval(hits)
    groups = clusters_of(names)
    accuracy |= {"clusters": len(groups), "interval": "wilson", "wilson": [accuracy["lo"], accuracy["hi"]]}
    if len(groups) == len(names):
        return accuracy
    if len(groups) == 1:
        return accuracy | {"lo": None, "hi": None, "interval": None}
    if min(_varying(hits, groups), _varying(1 - hits, groups)) < FEW:
        smooth = accuracy_with_interval(hits, size=effective_size(groups))
        return accuracy | {"lo": smooth["lo"], "hi": smooth["hi"], "interval": "wilson over prompts"}
    lo, hi = cluster_bootstrap(hits, names, draws=draws, seed=seed)
    return accuracy | {"lo": lo, "hi": hi, "interval": "cluster bootstrap"}


def mean_difference(difference: Array, clusters: Sequence[str], *, draws: int, seed: int) -> dict:
    """Mean of paired differences [u] of hits, each in [-1, 1], with a 95% interval.

    `interval` is "bootstrap" over clusters, or "score" where few clusters differ: Tango's, as if each cluster were one
    observation, which for n pairs that all agree is 0 +- z^2 / (n + z^2). It is None for a single cluster, as lo and hi
    are. `differing` counts the units whose difference is not 0.
    """
    groups = clusters_of(clusters)
    found = {
        "mean": float(difference.mean()), "lo": None, "hi": None, "n": len(difference), "clusters": len(groups),
        "differing": int((difference != 0).sum()), "interval": None,
    }  # fmt: skip
    if len(groups) == 1:
        return found
    if _varying(difference, groups) >= FEW:
        lo, hi = cluster_bootstrap(difference, clusters, draws=draws, seed=seed)
        return found | {"lo": lo, "hi": hi, "interval": "bootstrap"}
    size = effective_size(groups)
    better, worse = (float(np.maximum(sign * difference, 0).mean()) * size for sign in (1, -1))
    lo, hi = tango_interval(better, worse, size)
    return found | {"lo": lo, "hi": hi, "interval": "score"}


def tango_interval(better: float, worse: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Score interval of the difference of two paired proportions (Tango 1998, Statistics in Medicine 17:891).

    The ends are the differences D at which (better - worse - n D)^2 = z^2 n (2 q + D (1 - D)), where q is the maximum
    likelihood of the share `worse / n` among all with that difference. Its coverage is near 95% for small n too
    (Newcombe 1998, Statistics in Medicine 17:2635).

    Args:
        better, worse: pairs in which the one is right and the other is wrong; need not be whole numbers.
        n: all pairs, also those in which both are right, or both wrong.
    """

    def excess(difference: float) -> float:
        """Square of the standardised distance from `difference`, less z^2; it grows away from the estimate."""
        b = -better - worse + (2 * n - better + worse) * difference
        c = -worse * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        distance = (better - worse - n * difference) ** 2
        return distance - z * z * max(variance, 0.0)

    estimate = (better - worse) / n
    return _root(excess, estimate, -1.0), _root(excess, estimate, 1.0)


def _root(excess: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `excess` changes from 0 or less, as it is at `inside`, by bisection; `outside` where it does not change."""
    if excess(outside) <= 0:
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
    return (inside + outside) / 2


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[str], *, draws: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """95% percentile interval of the mean of values [u] when whole clusters are drawn with replacement.

    The mean is over units (a ratio of sums), so larger clusters weigh more. The interval is too narrow for fewer than
    about 20 clusters, and (None, None) for one.
    """
    groups = list(clusters_of(clusters).values())
    if len(groups) < 2:
        return None, None
    values = np.asarray(values, dtype=np.float64)
    sums = np.array([[values[at].sum(), len(at)] for at in groups])
    rng, size = np.random.default_rng(seed), len(groups)
    step = max(1, 10**7 // size)  # so that the counts of one block stay below 80 MB
    blocks = [min(step, draws - done) for done in range(0, draws, step)]
    totals = np.concatenate([rng.multinomial(size, np.full(size, 1 / size), size=b) @ sums for b in blocks])
    lo, hi = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(lo), float(hi)


def effective_size(groups: dict[str, list[int]]) -> float:
    """Independent observations that the units are worth if those of a cluster are all alike: u^2 / sum of sizes^2."""
    sizes = np.array([len(at) for at in groups.values()], dtype=np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def clusters_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> positions, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name, []).append(i)
    return groups


def _varying(values: Array, groups: dict[str, list[int]]) -> int:
    """How many clusters have a value that is not 0."""
    return sum(bool(np.any(values[at] != 0)) for at in groups.values())
