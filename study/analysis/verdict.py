"""What a curve of gold shows: over-optimised, no turn-over within range, or cannot conclude."""

from __future__ import annotations

import math
from dataclasses import dataclass

from study.analysis.bootstrap import Array, Interval, simultaneous

RESOLUTION = 0.1
"""Of gold, in standard deviations within prompts: a smaller drop counts as none."""
LEAST_POINTS, LEAST_PROMPTS = 3, 20
"""Fewer points do not make a curve, and fewer prompts cannot be resampled."""
OVER_OPTIMISED = "over-optimised"
NO_TURN_OVER = "no turn-over within range"
CANNOT_CONCLUDE = "cannot conclude"
NOT_OPTIMISED = "not optimised"
"""Of a policy whose proxy reward did not rise: its gold then says nothing about over-optimisation."""


@dataclass(frozen=True, slots=True)
class Verdict:
    kind: str
    why: str


def verdict(drop: Interval, most: float, *, prompts: int, seeds: int, points: int, end: str) -> Verdict:
    """Judge the drop of gold from its best point to the end of the curve, in standard deviations within prompts.

    Args:
        drop: cross-fitted (`study.analysis.bootstrap.cross_fitted_peak`): above 0, there is one.
        most: upper bound of the drop from any point (`largest_drop`): only a small one excludes that there is one,
            since with a few noisy prompts the best point may be the last, where `drop` is 0 without any spread.
        points: of the curve within the range that is judged.
        end: the last point, in words.
    """
    if points < LEAST_POINTS or prompts < LEAST_PROMPTS:
        return Verdict(
            CANNOT_CONCLUDE,
            f"{points} points on {prompts} prompts: at least {LEAST_POINTS} and {LEAST_PROMPTS} are needed (best-of-n "
            "is judged up to a quarter of the pool)",
        )
    if drop.lo > 0:
        return Verdict(OVER_OPTIMISED, f"gold falls by {drop} SD from its best point to {end}")
    if most > RESOLUTION:
        more = math.ceil(prompts * (max(most, drop.half_width) / RESOLUTION) ** 2)
        many = f"some {max(more, prompts + 1)} prompts" if more < 100_000 else "far more prompts"
        return Verdict(
            CANNOT_CONCLUDE,
            f"the drop of gold to {end}, {drop} SD, may be 0 or as much as {most:.2f}: {many} would tell"
            + ("" if seeds >= 3 else ", and at least 3 seeds"),
        )
    return Verdict(NO_TURN_OVER, f"gold falls by no more than {max(most, 0):.2f} SD to {end}")


def largest_drop(mean: Array, draws: Array) -> float:
    """95% upper bound, over all points of a curve [K] with draws [B, K] at once, of a point minus the last one."""
    if len(mean) < 2:
        return 0.0
    return float(simultaneous(mean[:-1] - mean[-1], draws[:, :-1] - draws[:, -1:])[1].max())
