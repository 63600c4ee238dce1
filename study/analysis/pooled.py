"""Policies of one condition over their seeds, pooled at equal KL.

Policies of one condition were trained against reward models of one variant, size and noise with one KL coefficient;
they differ in their seeds. Each has its own KL at each step, so a pooled curve has its points at given KLs: the values
of each policy are interpolated, linearly in d = sqrt(KL), to the first time that its KL was that, on the range that all
of them reach.

The measured KL has an error of its own, which a prompt's samples share with gold. What a prompt contributes to the
interpolated mean therefore holds the derivative with respect to its KL too (the influence function), so that intervals
over prompts contain that error.

Shape legend: S seeds, P prompts, T steps, K points of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from study.analysis.bootstrap import Array, Interval, crossed_draws, interval
from study.analysis.conditions import Curve, Plan
from study.analysis.fits import NEAR_ORIGIN, fit_curve
from study.analysis.policies import Measured, judge
from study.analysis.verdict import CANNOT_CONCLUDE, OVER_OPTIMISED, Verdict, verdict
from study.design import Condition

GRID = 25
"""Points of a pooled curve, even in sqrt(KL)."""


@dataclass(frozen=True, slots=True)
class Group:
    """Policies of one condition and KL coefficient."""

    name: str
    condition: Condition
    kl_coef: float | None
    runs: tuple[Measured, ...]
    seeds: tuple[int | None, ...]
    """Of each run; None where it is not known."""

    @property
    def prompts(self) -> list[str]:
        """Those on which all of its policies were evaluated."""
        return sorted(set.intersection(*(set(run.prompts) for run in self.runs)))

    def only(self, seeds: Sequence[int | None]) -> Group:
        """With the runs of these seeds, in their order."""
        return replace(self, runs=tuple(self.runs[self.seeds.index(s)] for s in seeds), seeds=tuple(seeds))


def grouped(runs: Sequence[tuple[Measured, Condition | None, float | None, int | None]]) -> list[Group]:
    """Policies (run, condition of its reward model, KL coefficient, seed) of one condition and coefficient together."""
    found: dict[tuple[Condition, float | None], list[tuple[Measured, int | None]]] = {}
    for run, condition, coef, seed in runs:
        if condition is not None:
            found.setdefault((condition, coef), []).append((run, seed))
    return [
        Group(
            condition.name + ("" if coef is None else f"-kl{coef:g}"), condition, coef,
            tuple(run for run, _ in members), tuple(seed for _, seed in members),
        )
        for (condition, coef), members in found.items()
    ]  # fmt: skip


def reached(run: Measured) -> tuple[NDArray[np.int64], Array]:
    """The steps (as indices) at which the KL was larger than ever before, and sqrt(KL) there."""
    d = np.sqrt(np.maximum(run.kl.mean(axis=0), 0))
    before = np.concatenate(([-1.0], np.maximum.accumulate(d)[:-1]))
    at = np.flatnonzero(d > before)
    return at, d[at]


def shared_range(runs: Sequence[Measured]) -> tuple[float, float]:
    """sqrt(KL) from which and up to which all runs were measured; not the smaller one first where they share none."""
    ends = [reached(run)[1] for run in runs]
    return max(float(d[0]) for d in ends), min(float(d[-1]) for d in ends)


def at_kl(run: Measured, metric: str, prompts: Sequence[str], d: Array) -> Array:
    """What prompts contribute [P, K] to the mean of a metric at the first time that sqrt(KL) was d [K]."""
    place = {p: i for i, p in enumerate(run.prompts)}
    rows = [place[p] for p in prompts]
    steps, known = reached(run)
    values, kl = run.gains[metric][rows][:, steps], run.kl[rows][:, steps]
    if len(known) == 1:
        return np.repeat(values, len(d), axis=1)
    right = np.clip(np.searchsorted(known, d), 1, len(known) - 1)
    left = right - 1
    t = (d - known[left]) / (known[right] - known[left])
    # The error of d is that of the KL over 2 d. Near d = 0, where KL and its error are both about 0, it is left out.
    error = np.where(known > NEAR_ORIGIN, (kl - kl.mean(axis=0)) / (2 * np.maximum(known, NEAR_ORIGIN)), 0.0)
    slope = (values.mean(axis=0)[right] - values.mean(axis=0)[left]) / (known[right] - known[left])
    return (1 - t) * (values[:, left] - slope * error[:, left]) + t * (values[:, right] - slope * error[:, right])


def pooled_curves(group: Group, plan: Plan) -> dict[str, Curve]:
    """proxy and gold of a group against the KL that all of its policies reach; empty where they share no range or
    fewer than two prompts."""
    prompts, (first, last) = group.prompts, shared_range(group.runs)
    if len(prompts) < 2 or first >= last:
        return {}
    d = np.linspace(first, last, GRID)
    return {
        metric: _pooled(group, metric, np.stack([at_kl(run, metric, prompts, d) for run in group.runs]), d, plan)
        for metric in ("proxy", "gold")
    }


def _pooled(group: Group, metric: str, values: Array, d: Array, plan: Plan) -> Curve:
    run = group.runs[0]
    return Curve(group.name, "ppo_pooled", metric, d**2, d**2, run.kl_kind, values, run.samples, plan.draws, plan.seed)


def pooled_findings(group: Group, curves: Mapping[str, Curve], own: Sequence[Verdict]) -> dict:
    """Numbers and verdict of a group at the largest KL that all of its policies reach.

    Args:
        curves: of `pooled_curves`.
        own: the verdict on each policy by itself.
    """
    gold, proxy = curves["gold"], curves["proxy"]
    (evidence, top, chosen), S = gold.evidence(), len(group.runs)
    points = min(int(np.count_nonzero(reached(run)[1] <= gold.d[-1] + 1e-9)) for run in group.runs)
    rise = _crossed(proxy.values[..., -1:] - proxy.values[..., :1], proxy)
    judged = judge(verdict(replace(evidence, points=points), gold.end), rise)
    if S == 1:
        judged = Verdict(CANNOT_CONCLUDE, f"one policy, {own[0].kind} by itself: another seed may turn elsewhere")
    at = int(np.median(chosen))
    peaks = gold.kl[gold.draws.argmax(axis=1)]
    return {
        "policies": [run.name for run in group.runs],
        "kl_coef": group.kl_coef,
        "seeds": S,
        "prompts": gold.values.shape[1],
        "checkpoints": points,
        "kl": float(gold.kl[-1]),
        "gold": gold.at(-1),
        "proxy": proxy.at(-1),
        "peak_kl": interval(float(gold.kl[at]), peaks),
        "gold_at_peak": _crossed(top, gold),
        "rise": evidence.rise,
        "drop": evidence.drop,
        "proxy_rise": rise,
        "proxy_since_peak": _crossed(proxy.values[..., -1:] - proxy.values[..., at : at + 1], proxy),
        "over_optimised": sum(v.kind == OVER_OPTIMISED for v in own),
        "fit": fit_curve(gold.d, gold.mean, gold.draws, "rl", fell=evidence.drop.lo > 0),
        "verdict": judged,
    }


def _crossed(values: Array, like: Curve) -> Interval:
    return interval(float(values.mean()), crossed_draws(values, like.draws_asked, like.seed)[:, 0])
