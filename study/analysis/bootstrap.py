"""Intervals over seeds and prompts: the crossed bootstrap, simultaneous bands, cross-fitted peaks. Pure NumPy.

Shape legend: S seeds (reward models of one condition), P prompts, K points of a curve, B bootstrap draws.

Prompts and seeds are the independent units; samples of a prompt, points of a curve and seeds x prompts are not. All
functions take draws [B, K] of a curve's mean, so that whatever is computed from a curve (a fit, a ratio, a peak) is
computed on every draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    mean: float
    lo: float
    hi: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.lo:+.2f}, {self.hi:+.2f}]"

    @property
    def half_width(self) -> float:
        return (self.hi - self.lo) / 2

    @property
    def excludes_zero(self) -> bool:
        return self.lo > 0 or self.hi < 0


def crossed_draws(values: Array, draws: int, seed: int) -> Array:
    """Bootstrap draws [B, K] of the mean of values [S, P, K], seeds and prompts drawn independently of each other.

    With S = 1 only prompts are drawn: the interval is then of that one reward model. Few seeds are corrected for twice,
    or intervals would be too narrow (three seeds drawn with replacement have 2/3 of the variance): the effects of seeds
    are scaled by sqrt(S / (S - 1)), and all deviations by t / 1.96 with Satterthwaite's degrees of freedom for the sum
    of the two variances. Where seeds dominate that is the t interval over seeds, where prompts do, a normal one.

    The same `seed`, S and P give the same prompts and seeds, so that two curves are paired.

    Raises:
        ValueError: not three dimensions, fewer than two prompts, or values that are not finite.
    """
    if values.ndim != 3 or values.shape[1] < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"values of shape {values.shape}: pass finite [seeds, prompts, points] with two prompts at least"
        )
    S, P, _ = values.shape
    mean: Array = values.mean(axis=(0, 1))
    of_seed: Array = values.mean(axis=1)
    degrees = freedom(values)
    if S > 1:
        values = values + (np.sqrt(S / (S - 1)) - 1) * (of_seed - mean)[:, None]
    rng = np.random.default_rng(seed)
    prompts = rng.multinomial(P, np.full(P, 1 / P), size=draws) / P
    seeds = rng.multinomial(S, np.full(S, 1 / S), size=draws) / S
    means: Array = np.sum([seeds[:, s, None] * (prompts @ values[s]) for s in range(S)], axis=0)
    return mean + (means - mean) * (student_quantile(0.975, degrees) / NormalDist().inv_cdf(0.975))


def difference_draws(ours: Array, theirs: Array, draws: int, seed: int) -> tuple[Array, float]:
    """Draws [B, K] of the mean of values [S, P, K] less that of others [S', P, K] on the same prompts, whose seeds have
    nothing in common and are drawn independently; and their degrees of freedom.

    Corrected for few seeds as `crossed_draws` is; a side of one seed is that one model.
    """
    of_prompts: Array = ours.mean(axis=0) - theirs.mean(axis=0)
    P, rng = len(of_prompts), np.random.default_rng(seed)
    mean: Array = of_prompts.mean(axis=0)
    off: Array = (rng.multinomial(P, np.full(P, 1 / P), size=draws) / P) @ (of_prompts - mean)
    parts = [(float(of_prompts.var(axis=0, ddof=1).sum()) / P, P - 1)]
    for side in (ours, theirs):
        if (S := len(side)) > 1:
            of_seeds: Array = side.mean(axis=1)
            drawn = rng.multinomial(S, np.full(S, 1 / S), size=draws) / S
            off = off + np.sqrt(S / (S - 1)) * (drawn @ (of_seeds - of_seeds.mean(axis=0)))
            parts.append((float(of_seeds.var(axis=0, ddof=1).sum()) / S, S - 1))
    degrees = _satterthwaite(parts)
    return mean + off * (student_quantile(0.975, degrees) / NormalDist().inv_cdf(0.975)), degrees


def freedom(values: Array) -> float:
    """Satterthwaite's degrees of freedom of the mean of values [S, P, K], from its variances over prompts and seeds."""
    S, P, _ = values.shape
    return _satterthwaite(list(zip(_variances(values), (P - 1, S - 1), strict=False)))


def _satterthwaite(parts: Sequence[tuple[float, int]]) -> float:
    """Degrees of freedom of a sum of variances, each with its own; those of the first where all are 0."""
    total = sum(v for v, _ in parts)
    return float(total**2 / sum(v**2 / f for v, f in parts)) if total > 0 else parts[0][1]


def _variances(values: Array) -> list[float]:
    """Of the mean of values [S, P, K], summed over points: over prompts, and over seeds where there are several."""
    S, P, _ = values.shape
    found = [float(values.mean(axis=0).var(axis=0, ddof=1).sum()) / P]
    return found + ([float(values.mean(axis=1).var(axis=0, ddof=1).sum()) / S] if S > 1 else [])


def seeds_share(values: Array) -> float:
    """Share of the variance of the mean of values [S, P, K] that comes from the seeds; 0 for one seed."""
    prompts, *seeds = _variances(values)
    return sum(seeds) / (prompts + sum(seeds)) if seeds and prompts + sum(seeds) > 0 else 0.0


def student_quantile(p: float, freedom: float) -> float:
    """The p-quantile, p > 1/2, of Student's t."""
    a, mass = _student(freedom)
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * p - 1, mass, a)))


def student_tails(t: float, freedom: float) -> float:
    """P(|T| >= t), t >= 0, of Student's t; not below 1e-9, which is what the integration below is good for."""
    a, mass = _student(freedom)
    return float(max(1 - np.interp(np.arctan(t / np.sqrt(freedom)), a, mass), 1e-9))


def _student(freedom: float) -> tuple[Array, Array]:
    """Angles a and P(|T| <= sqrt(freedom) tan(a)): in a, Student's t has the density cos(a)^(freedom - 1)."""
    a = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(a) ** (freedom - 1)
    mass = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return a, mass / mass[-1]


def interval(mean: float, draws: Array, level: float = 0.95) -> Interval:
    """Percentile interval of draws [B]."""
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(lo), float(hi))


def p_value(values: Array, draws: int, seed: int) -> float:
    """Two-sided p of a mean of 0 for values [S, P, 1]: Student's t with the error and the degrees of freedom of the
    interval of `crossed_draws`, so that it is below 5% where that excludes 0; 1 where nothing varies.

    A share of the draws could not be below 1 / `draws`, which correction for many comparisons makes useless.
    """
    degrees = freedom(values)
    widened = student_quantile(0.975, degrees) / NormalDist().inv_cdf(0.975)
    error = float(crossed_draws(values, draws, seed)[:, 0].std(ddof=1)) / widened
    return student_tails(abs(float(values.mean())) / error, degrees) if error > 0 else 1.0


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979): rejecting those below 5% has a 5% chance of any error."""
    adjusted, worst = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.__getitem__)):
        worst = max(worst, min(1.0, (len(p) - k) * p[name]))
        adjusted[name] = worst
    return adjusted


def pointwise(draws: Array, level: float = 0.95) -> tuple[Array, Array]:
    """(lo [K], hi [K]), each point for itself."""
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return lo, hi


def simultaneous(mean: Array, draws: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Band (lo [K], hi [K]) that holds the whole curve with probability `level`: mean -+ c se, c a quantile of max |t|.

    Points without spread (gains at n = 1 are 0 by construction) keep their mean.
    """
    se = draws.std(axis=0, ddof=1)
    varies = se > 1e-12 * (np.abs(mean).max() + 1)
    if not varies.any():
        return mean.copy(), mean.copy()
    worst = (np.abs(draws - mean)[:, varies] / se[varies]).max(axis=1)
    c = np.quantile(worst, level)
    return mean - c * se * varies, mean + c * se * varies


def cross_fitted_peak(values: Array, seed: int, splits: int = 10) -> tuple[Array, NDArray[np.int64]]:
    """The best point of a curve without the bias of choosing and measuring at once.

    Prompts are halved `splits` times; the best point of the mean over one half is measured on the other half. On
    average that is not above the true peak, since the point that is chosen may be another one.

    Returns:
        peak [S, P, 1]: value of each prompt at points that were chosen without it; feed it, or what it exceeds another
        point by, to `crossed_draws`. Chosen points [2 * splits].
    """
    P = values.shape[1]
    rng, peak, chosen = np.random.default_rng(seed), np.zeros(values.shape[:2]), []
    for _ in range(splits):
        half = rng.permutation(P) % 2
        for fold in (0, 1):
            best = int(values[:, half == fold].mean(axis=(0, 1)).argmax())
            rest = half != fold
            peak[:, rest] += values[:, rest, best] / splits
            chosen.append(best)
    return peak[..., None], np.array(chosen, dtype=np.int64)


def best_above(values: Array, draws: Array, peak: Array, k: int, *, seed: int) -> Interval:
    """95% interval of how far the best point of a curve lies above its point k, which is never below 0.

    The lower bound is that of the cross-fitted peak, which is no more than the true one on average. The upper bound
    holds for all points at once, so it holds for whichever is the true peak.

    Args:
        values: [S, P, K]; draws [B, K] of their mean (`crossed_draws`).
        peak: [S, P, 1], of `cross_fitted_peak`.
        seed: of the bootstrap.
    """
    mean = values.mean(axis=(0, 1))
    over = peak - values[..., k : k + 1]
    fitted = interval(float(over.mean()), crossed_draws(over, len(draws), seed)[:, 0])
    most = simultaneous(mean - mean[k], draws - draws[:, k : k + 1])[1].max()
    middle = max(0.0, fitted.mean)
    return Interval(middle, min(max(0.0, fitted.lo), middle), max(float(most), middle))
