"""What pools and series of policies say about over-optimisation: curves, fits, peaks and verdicts. No models, no files.

Gains are over the reference: each value minus the mean of its prompt's pool, in standard deviations within prompts of
the pool. So every curve begins at 0, offsets of a prompt (which Bradley-Terry leaves free) cancel, and proxy and gold
have one unit. Scale changes no sign, peak or verdict.

Shape legend: S seeds of a condition, P prompts, N samples a prompt, K points of a curve, B draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from bon.estimators import best_of_n, kl_bound, kl_pool, kl_with_atom, oracle, win_rate
from bon.gains import gains
from bon.pools import Pools
from bon.soft import soft_best_of_n
from rm import combine
from study.analysis.bootstrap import (
    Array,
    Interval,
    cross_fitted_peak,
    crossed_draws,
    interval,
    p_value,
    pointwise,
    simultaneous,
)
from study.analysis.fits import fit_curve
from study.analysis.verdict import largest_drop, verdict
from study.design import Condition

TRUSTED = 4
"""Best-of-n is trusted for n up to 1 / TRUSTED of the pool: beyond, a prompt has few independent draws."""
COLUMNS = (
    "rm", "method", "x", "d", "kl", "kl_kind", "metric", "mean", "lo", "hi", "band_lo", "band_hi", "prompts", "pool",
    "effective_draws", "seeds",
)  # fmt: skip


@dataclass
class Curve:
    """One metric of one condition: values [S, P, K] at points `x` with their KL [K], nats."""

    rm: str
    method: str
    metric: str
    x: NDArray[np.int64]
    kl: Array
    kl_kind: str
    values: Array = field(repr=False)
    pool: int
    draws_asked: int
    seed: int

    @property
    def d(self) -> Array:
        return np.sqrt(np.maximum(self.kl, 0))

    @property
    def mean(self) -> Array:
        return self.values.mean(axis=(0, 1))

    @cached_property
    def draws(self) -> Array:
        """[B, K]; the same prompts for every curve of as many seeds and prompts."""
        return crossed_draws(self.values, self.draws_asked, self.seed)

    def at(self, k: int) -> Interval:
        return interval(self.mean[k], self.draws[:, k])

    def upto(self, k: int) -> Curve:
        """The curve without the points after the k-th."""
        part = slice(None, k + 1)
        return Curve(
            self.rm, self.method, self.metric, self.x[part], self.kl[part], self.kl_kind, self.values[..., part],
            self.pool, self.draws_asked, self.seed,
        )  # fmt: skip

    def rows(self) -> list[dict]:
        lo, hi = pointwise(self.draws)
        band_lo, band_hi = simultaneous(self.mean, self.draws)
        numbers = (self.mean, lo, hi, band_lo, band_hi)
        S, P, K = self.values.shape
        names = ("mean", "lo", "hi", "band_lo", "band_hi")
        return [
            {
                "rm": self.rm, "method": self.method, "x": int(self.x[k]), "d": float(self.d[k]),
                "kl": float(self.kl[k]), "kl_kind": self.kl_kind, "metric": self.metric,
                **{name: float(column[k]) for name, column in zip(names, numbers, strict=True)},
                "prompts": P, "pool": self.pool, "seeds": S,
                "effective_draws": self.pool / float(self.x[k]) if self.method != "ppo" else self.pool,
            }
            for k in range(K)
        ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How to analyse: the same for every condition."""

    ns: NDArray[np.int64]
    """[K], whole numbers from 1 to N, ascending."""
    draws: int = 1000
    seed: int = 0
    ensembles: tuple[str, ...] = ()
    """Combiners of the members of a condition (`rm.combine.combiner`)."""
    temperatures: tuple[float, ...] = ()
    """Of soft best-of-n, in standard deviations of the proxy within prompts."""


def condition_proxies(
    pools: Pools, conditions: Mapping[Condition, Sequence[str]], plan: Plan
) -> dict[Condition, Array]:
    """Gains of the proxies [S, P, N] of each condition, and of ensembles of those with several seeds."""
    found = {}
    for condition, members in conditions.items():
        stacked = np.stack([gains(pools.proxies[m]) for m in members])
        found[condition] = stacked
        if len(members) > 1:
            flat = torch.from_numpy(stacked.reshape(len(members), -1))
            for rule in plan.ensembles:
                combined = combine.combiner(rule)(flat).numpy().reshape(pools.gold.shape)
                found[condition.ensemble(rule, len(members))] = gains(combined)[None]
    return found


def bon_curves(pools: Pools, name: str, proxies: Array, plan: Plan) -> dict[str, Curve]:
    """Metric -> curve of best-of-n by proxies [S, P, N] of one condition."""
    gold, ns = gains(pools.gold), plan.ns
    values = {
        "proxy": np.stack([best_of_n(p, p, ns) for p in proxies]),
        "gold": np.stack([best_of_n(p, gold, ns) for p in proxies]),
    }
    if pools.length is not None:
        values["length"] = np.stack([best_of_n(p, pools.length, ns) for p in proxies])
    # What a linear relation of gold and proxy within prompts would give; the rest is the tail (extremal Goodhart).
    slopes = [(p * gold).sum() / (p * p).sum() for p in proxies]
    values["regressional"] = values["proxy"] * np.array(slopes)[:, None, None]
    if (rest := beyond_length(gold, pools.length)) is not None:
        values["gold_beyond_length"] = np.stack([best_of_n(p, rest, ns) for p in proxies])
    curves = {m: _bon(name, m, v, ns, pools, plan) for m, v in values.items()}
    below = ns[ns < pools.size]
    curves["win_rate"] = _bon(
        name, "win_rate", np.stack([win_rate(p, gold, below) for p in proxies]), below, pools, plan
    )
    return curves


def beyond_length(gold: Array, length: Array | None) -> Array | None:
    """What gold gains [P, N] hold beside their regression on length within prompts, in the same unit; None where
    lengths are unknown or do not vary. A gain that is gone here was length."""
    if length is None or not np.ptp(length, axis=1).any():
        return None
    x = gains(length)
    return gold - (x * gold).sum() / (x * x).sum() * x


def baselines(pools: Pools, plan: Plan) -> list[Curve]:
    """The oracle (selection by gold), the longest response, and chance."""
    gold = gains(pools.gold)
    found = [
        _bon("oracle", "gold", oracle(gold, plan.ns)[None], plan.ns, pools, plan),
        _bon("random", "gold", np.zeros((1, len(gold), len(plan.ns))), plan.ns, pools, plan),
    ]
    if pools.length is not None:
        found.append(_bon("longest", "gold", best_of_n(pools.length, gold, plan.ns)[None], plan.ns, pools, plan))
    return found


def soft_curves(pools: Pools, name: str, proxies: Array, plan: Plan) -> list[Curve]:
    """Gold of soft best-of-n; its KL is at most that of best-of-n of the same n."""
    gold = gains(pools.gold)
    ns = plan.ns[np.unique(np.round(np.geomspace(1, len(plan.ns), 12)).astype(int) - 1)]
    return [
        _bon(f"{name}, soft {t:g}", "gold", np.stack([soft_best_of_n(p, gold, ns, t, seed=plan.seed) for p in proxies]),
             ns, pools, plan, method="soft_bon")
        for t in plan.temperatures
    ]  # fmt: skip


def disagreement_curve(pools: Pools, name: str, members: Array, plan: Plan) -> Curve:
    """Standard deviation over members [S, P, N] of what best-of-n by their mean chooses: where it rises with n,
    selection goes where the reward models have nothing in common."""
    values = best_of_n(members.mean(axis=0), members.std(axis=0), plan.ns)
    return _bon(name, "disagreement", values[None], plan.ns, pools, plan)


def _bon(
    name: str, metric: str, values: Array, ns: NDArray[np.int64], pools: Pools, plan: Plan, method: str = "bon"
) -> Curve:
    return Curve(name, method, metric, ns, kl_bound(ns), "bound", values, pools.size, plan.draws, plan.seed)


def kl_table(pools: Pools, proxies: Mapping[str, Array], ns: NDArray[np.int64]) -> list[dict]:
    """The KLs of best-of-n side by side, nats: the bound, the pool's own (ties lower it), and atom-corrected.

    The atom is the mass of the pool's best response under the reference, exp of its log-probability.
    """
    rows = []
    for name, stacked in proxies.items():
        pooled = np.mean([kl_pool(p, ns).mean(axis=0) for p in stacked], axis=0)
        atom = np.full(len(ns), np.nan)
        if pools.logp is not None:
            eps = [np.exp(np.take_along_axis(pools.logp, p.argmax(axis=1)[:, None], 1)) for p in stacked]
            atom = np.mean([kl_with_atom(ns[None, :], np.minimum(e, 1.0)).mean(axis=0) for e in eps], axis=0)
        rows += [
            {"rm": name, "n": int(n), "bound": float(kl_bound(n)), "pool": float(p), "atom": float(a)}
            for n, p, a in zip(ns, pooled, atom, strict=True)
        ]
    return rows


def findings(curves: Mapping[str, Curve], best: Curve, baseline: Curve | None = None) -> dict:
    """The numbers and the verdict of one condition of best-of-n.

    Args:
        best: the oracle's curve.
        baseline: gold of what it is compared with, prompt by prompt and, where both have as many, seed by seed.
    """
    gold, last = curves["gold"], len(curves["gold"].x) - 1
    k = int(np.flatnonzero(gold.x <= max(1, gold.pool // TRUSTED))[-1])
    S, P, _ = gold.values.shape
    trusted = gold.upto(k)
    top, drop, chosen = cross_fitted_peak(trusted.values, gold.seed)
    fallen_draws = crossed_draws(drop, gold.draws_asked, gold.seed)[:, 0]
    fallen = interval(float(drop.mean()), fallen_draws)
    ratio = gold.draws[:, k] / best.draws[:, k]
    paired, p = None, None
    if baseline is not None:
        # An ensemble is one model: it is compared with what its members yield on average.
        other = baseline.values if len(baseline.values) == S else baseline.values.mean(axis=0, keepdims=True)
        change = (gold.values - other)[..., k : k + 1]
        paired, p = _crossed(change, gold), p_value(change, gold.draws_asked, gold.seed)
    peaks = trusted.draws.argmax(axis=1)
    return {
        "n_trusted": int(gold.x[k]),
        "seeds": S,
        "gold": gold.at(k),
        "proxy": curves["proxy"].at(k),
        "gold_at_n_max": gold.at(last),
        "peak_n": interval(float(np.median(trusted.x[chosen])), trusted.x[peaks].astype(float)),
        "peak_d": interval(float(np.median(trusted.d[chosen])), trusted.d[peaks]),
        "gold_at_peak": _crossed(top, gold),
        "drop": fallen,
        "drop_probability": float((fallen_draws > 0).mean()),
        "efficiency": interval(float(gold.mean[k] / best.mean[k]), ratio) if best.mean[k] > 0 else None,
        "regret": interval(float(best.mean[k] - gold.mean[k]), best.draws[:, k] - gold.draws[:, k]),
        "extremal_gap": _crossed((curves["regressional"].values - gold.values)[..., k : k + 1], gold),
        "harmed": float((gold.values[..., k] < 0).mean()),
        "win_rate": curves["win_rate"].at(min(k, len(curves["win_rate"].x) - 1)),
        "length": curves["length"].at(k) if "length" in curves else None,
        "gold_beyond_length": curves["gold_beyond_length"].at(k) if "gold_beyond_length" in curves else None,
        "difference": paired,
        "difference_p": p,
        "fit": fit_curve(trusted.d[1:], trusted.mean[1:], trusted.draws[:, 1:], "bon") if k else None,
        "verdict": verdict(
            fallen, largest_drop(trusted.mean, trusted.draws), prompts=P, seeds=S, points=k + 1, end=f"n = {gold.x[k]}"
        ),
    }


def _crossed(values: Array, like: Curve) -> Interval:
    """Interval of the mean of values [S, P, 1]."""
    return interval(float(values.mean()), crossed_draws(values, like.draws_asked, like.seed)[:, 0])
