"""What a curve of gold allows to say: over-optimised, no turn-over within range, or cannot conclude."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bon.bootstrap import Interval

RESOLUTION = 0.1
"""Of gold, in standard deviations within prompts: a drop that is smaller than this is called none."""
OVER_OPTIMISED = "over-optimised"
NO_TURN_OVER = "no turn-over within range"
CANNOT_CONCLUDE = "cannot conclude"


@dataclass(frozen=True, slots=True)
class Verdict:
    kind: str
    why: str


def verdict(drop: Interval, *, prompts: int, seeds: int, end: str) -> Verdict:
    """Judge the cross-fitted drop of gold from its best point to the end of the curve.

    Args:
        drop: in standard deviations of gold within prompts (`bon.bootstrap.cross_fitted_peak`).
        end: the last point, in words.
    """
    if drop.lo > 0:
        return Verdict(OVER_OPTIMISED, f"gold falls by {drop} SD from its best point to {end}")
    if drop.hi > RESOLUTION:
        more = math.ceil(prompts * (drop.half_width / RESOLUTION) ** 2)
        many = f"some {max(more, prompts + 1)} prompts" if more < 100_000 else "far more prompts"
        return Verdict(
            CANNOT_CONCLUDE,
            f"the drop of gold to {end}, {drop} SD, may be 0 or more than {RESOLUTION:g}: {many} would tell"
            + ("" if seeds >= 3 else ", and at least 3 seeds"),
        )
    return Verdict(NO_TURN_OVER, f"gold falls by no more than {max(drop.hi, 0):.2f} SD to {end}")
