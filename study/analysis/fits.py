"""Gao et al.'s curves of gold against d = sqrt(KL), refitted on every bootstrap draw (2210.10760, section 3).

best-of-n  R(d) = d (alpha - beta d)        peak at d* = alpha / (2 beta),        R* = alpha^2 / (4 beta)
RL         R(d) = d (alpha - beta log d)    peak at d* = exp(alpha / beta - 1),   R* = beta d*

Both are linear in alpha and beta and go through 0. Standard errors of the least-squares fit itself are useless here,
since the points of a curve share one pool: they hold the truth in 72 to 83 of 100 cases at nominal 95%.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from study.analysis.bootstrap import Array, Interval, interval

FORMS = ("bon", "rl")
NEAR_ORIGIN = 0.25
"""The RL form has infinite slope at 0, so Gao et al. do not trust it there: points nearer than this are left out."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted curve; intervals are of the fits to the bootstrap draws."""

    form: str
    points: int
    d_max: float
    """Of the points that were fitted."""
    alpha: Interval
    beta: Interval
    d_peak: Interval | None
    """None where gold has not fallen from its cross-fitted peak, the interval of beta holds 0, or the peak lies beyond
    d_max: "no turn-over within range"."""
    gold_peak: Interval | None
    rmse: float
    """Of the fit to the curve, in the units of gold."""
    extrapolation_error: Interval | None
    """Prediction minus curve at d_max, fitted to the lower half of the range of d only."""
    extrapolation_error_linear: float | None
    """The same of R = alpha d, to compare with."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def columns(d: Array, form: str) -> Array:
    """[K, 2], what alpha and beta multiply; ValueError for another form, or for d <= 0 of the RL form."""
    if form not in FORMS:
        raise ValueError(f"no form {form!r}: known are {', '.join(FORMS)}")
    if form == "rl" and not (d > 0).all():
        raise ValueError("d log d has no slope at 0: leave points with d = 0 out")
    return np.stack([d, -(d**2) if form == "bon" else -d * np.log(d)], axis=-1)


def least_squares(d: Array, gold: Array, form: str) -> Array:
    """alpha and beta [..., 2] of curves gold [..., K] at d [K]."""
    return gold @ np.linalg.pinv(columns(d, form)).T


def predict(parameters: Array, d: Array, form: str) -> Array:
    """[..., K] from parameters [..., 2]."""
    return parameters @ columns(np.atleast_1d(d), form).T


def peak(parameters: Array, form: str) -> tuple[Array, Array]:
    """d* and R* [...]; infinite where beta <= 0, since the curve then never falls."""
    alpha, beta = np.moveaxis(np.asarray(parameters, dtype=float), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if form == "bon":
            at, top = alpha / (2 * beta), alpha**2 / (4 * beta)
        else:
            at = np.exp(alpha / beta - 1)
            top = beta * at
    falls = beta > 0
    return np.where(falls, np.maximum(at, 0), np.inf), np.where(falls, top, np.inf)


def fit_curve(d: Array, mean: Array, draws: Array, form: str, *, fell: bool) -> Fit | None:
    """The fit to a curve mean [K] at d [K] with its draws [B, K]; None with fewer than four points that can be used.

    Args:
        fell: whether a drop from the peak was found without the fit. A curve that rises and levels off fits a parabola
            with a peak too, so a fitted peak is shown only beside a drop.
    """
    used = d > (NEAR_ORIGIN if form == "rl" else 0)
    if used.sum() < 4:
        return None
    d, mean, draws = d[used], mean[used], draws[:, used]
    whole, many = least_squares(d, mean, form), least_squares(d, draws, form)
    alpha, beta = (interval(whole[i], many[:, i]) for i in (0, 1))
    (at, top), (ats, tops) = peak(whole, form), peak(many, form)
    turns = fell and beta.lo > 0 and at <= d.max()
    error, linear = _extrapolation(d, mean, draws, form)
    return Fit(
        form,
        int(used.sum()),
        float(d.max()),
        alpha,
        beta,
        interval(float(at), ats) if turns else None,
        interval(float(top), tops) if turns else None,
        float(np.sqrt(np.mean((predict(whole, d, form) - mean) ** 2))),
        error,
        linear,
    )


def _extrapolation(d: Array, mean: Array, draws: Array, form: str) -> tuple[Interval | None, float | None]:
    low = d <= d.max() / 2
    if low.sum() < 3:
        return None, None
    last = int(d.argmax())

    def error(y: Array) -> Array:
        return predict(least_squares(d[low], y[..., low], form), d[last], form)[..., 0] - y[..., last]

    slope = float(mean[low] @ d[low] / (d[low] @ d[low]))
    return interval(float(error(mean)), error(draws)), slope * float(d[last]) - float(mean[last])
