"""Series of policies along training: gold and proxy against measured KL, and rules of when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bon.gains import scale
from bon.pools import Pools
from core.errors import ArtefactError
from study.analysis.bootstrap import Array, Interval, best_above, cross_fitted_peak, crossed_draws, interval
from study.analysis.conditions import Curve, Plan
from study.analysis.fits import fit_curve
from study.analysis.verdict import CANNOT_CONCLUDE, NOT_OPTIMISED, Verdict, verdict

ENTRIES = ("proxy", "gold", "kl")


@dataclass(frozen=True, slots=True)
class Measured:
    """One policy along training: gains and KL of each prompt [P, T], samples of a prompt averaged."""

    name: str
    steps: NDArray[np.int64]
    prompts: list[str]
    gains: dict[str, Array]
    """proxy and gold, in the unit of the study."""
    kl: Array
    """Nats."""
    kl_kind: str
    samples: int
    """Of a prompt and step."""


def measure(name: str, rows: Sequence[Mapping], *, pools: Pools | None = None, proxy: str | None = None) -> Measured:
    """One run from rows of step, prompt_id, proxy, gold, kl (nats) and kl_kind, one a sample.

    Gains are over the pool of the same prompt where `pools` holds all prompts and samples of the reference, else over
    the first step of the run, prompt by prompt. Their unit is the SD within prompts of the pools; without pools of that
    proxy, the SD over prompts of the first step.

    Raises:
        ArtefactError: steps with different prompts, scores that are not finite.
    """
    steps = sorted({row["step"] for row in rows})
    cells: dict[tuple, list[list[float]]] = {}
    for row in rows:
        cells.setdefault((row["step"], row["prompt_id"]), []).append([float(row[k]) for k in ENTRIES])
    prompts = sorted({prompt for _, prompt in cells})
    if missing := len(steps) * len(prompts) - len(cells):
        raise ArtefactError(f"series {name}: {missing} of {len(prompts)} prompts x {len(steps)} steps have no sample")
    values = np.array([[np.mean(cells[s, p], axis=0) for s in steps] for p in prompts])  # [P, steps, 3]
    if bad := int((~np.isfinite(values)).sum()):
        raise ArtefactError(f"series {name}: {bad} values of {', '.join(ENTRIES)} are NaN or infinite")
    gained = {}
    for j, metric in enumerate(ENTRIES[:2]):
        offset, unit = _origin(metric, values[..., j], prompts, pools, proxy)
        gained[metric] = (values[..., j] - offset) / unit
    kind = str(rows[0].get("kl_kind", "rb"))
    return Measured(name, np.array(steps), prompts, gained, values[..., 2], kind, len(rows) // len(cells))


def series_curves(
    name: str, rows: Sequence[Mapping], plan: Plan, *, pools: Pools | None = None, proxy: str | None = None
) -> dict[str, Curve]:
    """proxy and gold curves of one run (`measure` says of which rows)."""
    return curves_of(measure(name, rows, pools=pools, proxy=proxy), plan)


def curves_of(run: Measured, plan: Plan) -> dict[str, Curve]:
    """proxy and gold of one run, a point a step."""
    return {
        metric: Curve(
            run.name, "ppo", metric, run.steps, run.kl.mean(axis=0), run.kl_kind, values[None], run.samples,
            plan.draws, plan.seed,
        )
        for metric, values in run.gains.items()
    }  # fmt: skip


def _origin(
    metric: str, values: Array, prompts: list[str], pools: Pools | None, proxy: str | None
) -> tuple[Array, float]:
    """What gains of values [P, steps] are counted from [P, 1], and in: one unit wherever pools give it, and the
    origin always from the same prompts as the curve."""
    table = None
    if pools is not None and pools.prompt_ids:  # none of RL runs of other tools that came without pools
        table = pools.gold if metric == "gold" else pools.proxies.get(proxy or "")
    if pools is None or table is None:
        return values[:, :1], float(values[:, 0].std(ddof=1)) or 1.0
    place = {p: i for i, p in enumerate(pools.prompt_ids)}
    if pools.of_reference and set(prompts) <= place.keys():
        return table[[place[p] for p in prompts]].mean(axis=1, keepdims=True), scale(table)
    return values[:, :1], scale(table)


def stopping_rules(curves: Mapping[str, Curve]) -> list[dict]:
    """Gold and regret of three ways to choose a checkpoint: the last one, the best by proxy (blind), by gold (oracle).

    The oracle is cross-fitted: chosen on half of the prompts and measured on the others. It is what a rule can be
    compared with, never a result, since choosing by gold makes gold a training signal.
    """
    gold, proxy = curves["gold"], curves["proxy"]
    top, chosen = cross_fitted_peak(gold.values, gold.seed)
    rules = {"final": len(gold.x) - 1, "blind": int(proxy.mean.argmax())}
    rows = []
    for name, k in rules.items():
        regret = best_above(gold.values, gold.draws, top, k, seed=gold.seed)
        rows.append({"rule": name, "step": int(gold.x[k]), "kl": float(gold.kl[k]), "gold": gold.at(k),
                     "regret": regret})  # fmt: skip
    at = int(np.median(chosen))
    rows.append({"rule": "oracle", "step": int(gold.x[at]), "kl": float(gold.kl[at]), "gold": _over_prompts(top, gold),
                 "regret": None})  # fmt: skip
    return rows


def series_findings(curves: Mapping[str, Curve]) -> dict:
    """Numbers and verdict of one run."""
    gold, proxy = curves["gold"], curves["proxy"]
    (evidence, top, chosen), last = gold.evidence(), len(gold.x) - 1
    rise = _over_prompts(proxy.values[..., -1:] - proxy.values[..., :1], proxy)
    judged = judge(verdict(evidence, gold.end), rise)
    at = int(np.median(chosen))
    return {
        "peak_step": int(gold.x[at]),
        "peak_kl": float(gold.kl[at]),
        "gold_at_peak": _over_prompts(top, gold),
        "proxy_since_peak": _over_prompts(proxy.values[..., -1:] - proxy.values[..., at : at + 1], proxy),
        "step": int(gold.x[last]),
        "kl": float(gold.kl[last]),
        "gold": gold.at(last),
        "proxy": proxy.at(last),
        "proxy_rise": rise,
        "rise": evidence.rise,
        "drop": evidence.drop,
        "rules": stopping_rules(curves),
        "fit": fit_curve(gold.d, gold.mean, gold.draws, "rl", fell=evidence.drop.lo > 0),
        "verdict": judged,
    }


def judge(found: Verdict, rise: Interval) -> Verdict:
    """The verdict on gold, or that a training whose proxy reward rose by `rise` did not optimise it."""
    if rise.lo <= 0 and found.kind != CANNOT_CONCLUDE:
        return Verdict(NOT_OPTIMISED, f"the proxy itself changed by {rise} SD: this training did not optimise it")
    return found


def _over_prompts(values: Array, like: Curve) -> Interval:
    return interval(float(values.mean()), crossed_draws(values, like.draws_asked, like.seed)[:, 0])
