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
from bon.gains import gains, normal_scores
from bon.pools import Pools
from bon.soft import soft_best_of_n
from rm import combine
from study.analysis.bootstrap import (
    Array,
    Interval,
    best_above,
    cross_fitted_peak,
    crossed_draws,
    interval,
    p_value,
    pointwise,
    seeds_share,
    simultaneous,
)
from study.analysis.fits import fit_curve
from study.analysis.verdict import Evidence, verdict
from study.design import Condition

COLUMNS = (
    "rm", "method", "x", "d", "kl", "kl_kind", "metric", "mean", "lo", "hi", "band_lo", "band_hi", "prompts", "pool",
    "effective_draws", "seeds",
)  # fmt: skip


@dataclass
class Curve:
    """One metric of one condition: values [S, P, K] at points `x` with their KL [K], nats."""

    rm: str
    method: str
    """bon, soft_bon, ppo, or ppo_pooled: PPO's policies of several seeds at equal KL."""
    metric: str
    x: NDArray[np.int64] | Array
    """n, step, or KL (ppo_pooled)."""
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

    def evidence(self) -> tuple[Evidence, Array, NDArray[np.int64]]:
        """What the curve is judged by; and its cross-fitted peak [S, P, 1] with the points that were chosen."""
        peak, chosen = cross_fitted_peak(self.values, self.seed)
        rise, drop = (best_above(self.values, self.draws, peak, k, seed=self.seed) for k in (0, len(self.x) - 1))
        change = self.values[..., -1:] - self.values[..., :1]
        S, P, K = self.values.shape
        end = interval(float(change.mean()), crossed_draws(change, self.draws_asked, self.seed)[:, 0])
        return Evidence(rise, drop, end, K, P, S, seeds_share(change)), peak, chosen

    @property
    def end(self) -> str:
        """The last point, in words, with its KL."""
        if self.method == "ppo_pooled":
            return f"a KL of {self.kl[-1]:.2f} nats"
        # A series whose KL is the bound is not of PPO: its steps are n (`study.layouts.grm_repository`).
        unit = "step" if self.method == "ppo" and self.kl_kind != "bound" else "n ="
        return f"{unit} {self.x[-1]} (KL {self.kl[-1]:.2f} nats)"

    def rows(self) -> list[dict]:
        lo, hi = pointwise(self.draws)
        band_lo, band_hi = simultaneous(self.mean, self.draws)
        numbers = (self.mean, lo, hi, band_lo, band_hi)
        S, P, K = self.values.shape
        names = ("mean", "lo", "hi", "band_lo", "band_hi")
        return [
            {
                "rm": self.rm, "method": self.method, "x": self.x[k].item(), "d": float(self.d[k]),
                "kl": float(self.kl[k]), "kl_kind": self.kl_kind, "metric": self.metric,
                **{name: float(column[k]) for name, column in zip(names, numbers, strict=True)},
                "prompts": P, "pool": self.pool, "seeds": S,
                "effective_draws": self.pool / float(self.x[k]) if "ppo" not in self.method else self.pool,
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
    # What a linear relation of gold and the proxy's normal scores within prompts would give; the rest is the tail
    # (extremal Goodhart). Selection sees ranks only, so the scale of the proxy must not matter.
    scores = [normal_scores(p) for p in proxies]
    values["regressional"] = np.stack(
        [best_of_n(p, s, ns) * ((s * gold).sum() / (s * s).sum()) for p, s in zip(proxies, scores, strict=True)]
    )
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

    The atom is the mass of the chosen response under the reference, exp of its log-probability: a mean over what
    best-of-n chooses (Beirami et al. 2401.01879).
    """
    rows = []
    for name, stacked in proxies.items():
        pooled = np.mean([kl_pool(p, ns).mean(axis=0) for p in stacked], axis=0)
        atom = np.full(len(ns), np.nan)
        if pools.logp is not None:
            mass = np.minimum(np.exp(pools.logp), 1.0)
            atom = np.array([np.mean([best_of_n(p, kl_with_atom(n, mass), [n]) for p in stacked]) for n in ns])
        rows += [
            {"rm": name, "n": int(n), "bound": float(kl_bound(n)), "pool": float(p), "atom": float(a)}
            for n, p, a in zip(ns, pooled, atom, strict=True)
        ]
    return rows


def findings(curves: Mapping[str, Curve], best: Curve, baseline: Curve | None = None) -> dict:
    """The numbers and the verdict of one condition of best-of-n, at its largest n.

    Args:
        best: the oracle's curve.
        baseline: gold of what it is compared with, prompt by prompt and, where both have as many, seed by seed.
    """
    gold, last = curves["gold"], len(curves["gold"].x) - 1
    S = len(gold.values)
    evidence, top, chosen = gold.evidence()
    ratio = gold.draws[:, last] / best.draws[:, last]
    paired, p = None, None
    if baseline is not None:
        # An ensemble is one model: it is compared with what its members yield on average.
        other = baseline.values if len(baseline.values) == S else baseline.values.mean(axis=0, keepdims=True)
        change = (gold.values - other)[..., -1:]
        paired, p = _crossed(change, gold), p_value(change, gold.draws_asked, gold.seed)
    peaks = gold.draws.argmax(axis=1)
    fell, proxy, at = evidence.drop.lo > 0, curves["proxy"], int(np.median(chosen))
    return {
        "n": int(gold.x[last]),
        "kl": float(gold.kl[last]),
        "seeds": S,
        "gold": gold.at(last),
        "proxy": proxy.at(last),
        "peak_n": interval(float(np.median(gold.x[chosen])), gold.x[peaks].astype(float)),
        "peak_d": interval(float(np.median(gold.d[chosen])), gold.d[peaks]),
        "peak_kl": float(gold.kl[at]),
        "gold_at_peak": _crossed(top, gold),
        "proxy_since_peak": _crossed(proxy.values[..., -1:] - proxy.values[..., at : at + 1], proxy),
        "rise": evidence.rise,
        "drop": evidence.drop,
        "efficiency": interval(float(gold.mean[last] / best.mean[last]), ratio) if best.mean[last] > 0 else None,
        "regret": interval(float(best.mean[last] - gold.mean[last]), best.draws[:, last] - gold.draws[:, last]),
        "extremal_gap": _crossed((curves["regressional"].values - gold.values)[..., -1:], gold),
        "harmed": float((prompt_gains(gold) < 0).mean()),
        "win_rate": curves["win_rate"].at(len(curves["win_rate"].x) - 1),
        "length": curves["length"].at(last) if "length" in curves else None,
        "gold_beyond_length": curves["gold_beyond_length"].at(last) if "gold_beyond_length" in curves else None,
        "difference": paired,
        "difference_p": p,
        "fit": fit_curve(gold.d[1:], gold.mean[1:], gold.draws[:, 1:], "bon", fell=fell) if last else None,
        "verdict": verdict(evidence, gold.end),
    }


def prompt_gains(curve: Curve) -> Array:
    """[P]: the gain of each prompt at the end of the curve, mean over seeds."""
    values: Array = curve.values[..., -1].mean(axis=0)
    return values


def _crossed(values: Array, like: Curve) -> Interval:
    """Interval of the mean of values [S, P, 1]."""
    return interval(float(values.mean()), crossed_draws(values, like.draws_asked, like.seed)[:, 0])
