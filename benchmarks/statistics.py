"""What is said of the timings of a row: medians, and how far single runs lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal, TypedDict

Ratio = Literal["faster", "cost"]
"""faster: how many times the work per second of the other side. cost: how many times its seconds for the same work."""


class Spread(TypedDict):
    """Of one number over the runs."""

    median: float
    low: float
    """The smallest value."""
    high: float


class Run(TypedDict):
    """One timed run of one side."""

    seconds: float
    work: float
    """In the unit of the row."""


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    return {"median": median(values), "low": min(values), "high": max(values)}


def rate(run: Run) -> float:
    """Work per second."""
    return run["work"] / run["seconds"]


def ratios(ours: Sequence[Run], theirs: Sequence[Run], kind: Ratio) -> list[float]:
    """Of each pair of neighbouring runs. The machine's other work then hits both sides of a ratio alike, and their
    median says more than the ratio of the medians.

    Raises:
        ValueError: not equally many runs.
    """
    if kind == "faster":
        return [rate(a) / rate(b) for a, b in zip(ours, theirs, strict=True)]
    return [rate(b) / rate(a) for a, b in zip(ours, theirs, strict=True)]
