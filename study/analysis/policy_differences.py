"""Policies of one condition less those of another: at equal KL, at equal step, and as training ended.

Pairs are of prompts, and of seeds where both have them: seeds of two conditions share pairs, wrong labels and PPO's
random numbers. Where they share none, seeds are drawn independently of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from study.analysis.bootstrap import (
    Array,
    Interval,
    crossed_draws,
    difference_draws,
    freedom,
    interval,
    student_quantile,
    student_tails,
)
from study.analysis.conditions import Curve, Plan
from study.analysis.pooled import GRID, Group, at_kl, shared_range
from study.design import Condition

Baselines = Mapping[Condition, Condition]


def comparisons(groups: Sequence[Group], baseline: Baselines) -> list[tuple[Group, Group]]:
    """Each group with that of its baseline of the same rule and KL coefficient, an ensemble's with its members', and
    those of larger KL coefficients with that of the smallest: whether a penalty does more than stop early."""
    place = {(group.condition, group.kl_coef): group for group in groups}
    found = []
    for group in groups:
        condition = group.condition
        base = baseline.get(condition.members)
        others = [condition.members] if condition.rule else []
        if base is not None and base != condition.members:
            others.append(base.ensemble(condition.rule, condition.combined) if condition.rule else base)
        found += [(group, place[o, group.kl_coef]) for o in others if (o, group.kl_coef) in place]
    for group in groups:
        coefs = [g.kl_coef for g in groups if g.condition == group.condition and g.kl_coef is not None]
        if group.kl_coef is not None and group.kl_coef > min(coefs):
            found.append((group, place[group.condition, min(coefs)]))
    return found


def compare(ours: Group, theirs: Group, plan: Plan) -> tuple[dict[str, Any], Curve | None]:
    """Gold of `ours` less that of `theirs`, and the curve of it against KL; {} where prompts or KLs have no overlap."""
    common = [s for s in ours.seeds if s is not None and s in theirs.seeds]
    if paired := len(common) > 1 or set(ours.seeds) == set(theirs.seeds) == set(common):
        ours, theirs = ours.only(common), theirs.only(common)
    prompts = sorted(set(ours.prompts) & set(theirs.prompts))
    first, last = shared_range([*ours.runs, *theirs.runs])
    if len(prompts) < 2 or first >= last:
        return {}, None
    d = np.linspace(first, last, GRID)
    gold, proxy = (
        [np.stack([at_kl(run, metric, prompts, d) for run in group.runs]) for group in (ours, theirs)]
        for metric in ("gold", "proxy")
    )
    of = lambda pair: difference(pair[0], pair[1], plan, paired=paired)  # noqa: E731
    at_end, p = of([v[..., -1:] for v in gold])
    facts: dict[str, Any] = {
        "policies": ours.name, "less": theirs.name, "kl_coef": ours.kl_coef,
        "seeds": len(ours.runs), "seeds_less": len(theirs.runs), "paired": paired, "prompts": len(prompts),
        "kl": float(last**2), "at_equal_kl": at_end, "p": p,
        "over_range": of([v.mean(axis=-1, keepdims=True) for v in gold])[0],
        "proxy_at_equal_kl": of([v[..., -1:] for v in proxy])[0],
    }  # fmt: skip
    steps = sorted(set.intersection(*(set(run.steps.tolist()) for run in (*ours.runs, *theirs.runs))))
    step = steps[-1] if steps else None
    if step is not None:
        facts |= {"step": int(step), "at_equal_step": of([at_step(g, prompts, step) for g in (ours, theirs)])[0]}
    facts["at_last_step"] = of([at_step(g, prompts, None) for g in (ours, theirs)])[0]
    for key, group in (("last_kl", ours), ("last_kl_less", theirs)):
        facts[key] = float(np.mean([run.kl[:, -1].mean() for run in group.runs]))
    return facts, _curve(ours, theirs, gold, d, plan, paired)


def at_step(group: Group, prompts: Sequence[str], step: int | None) -> Array:
    """Gold [S, P, 1] of each policy at a step, or at its last one."""
    found = []
    for run in group.runs:
        k = -1 if step is None else run.steps.tolist().index(step)
        rows = [run.prompts.index(p) for p in prompts]
        found.append(run.gains["gold"][rows, k])
    return np.stack(found)[..., None]


def difference(ours: Array, theirs: Array, plan: Plan, *, paired: bool) -> tuple[Interval, float]:
    """Values [S, P, 1] less others, prompt by prompt and, if `paired`, seed by seed; and the two-sided p of no
    difference, which is Student's with the error of the interval."""
    mean, draws, degrees = _less(ours, theirs, plan, paired)
    found = interval(float(mean[0]), draws[:, 0])
    error = found.half_width / student_quantile(0.975, degrees)
    return found, student_tails(abs(found.mean) / error, degrees) if error > 0 else 1.0


def _less(ours: Array, theirs: Array, plan: Plan, paired: bool) -> tuple[Array, Array, float]:
    """Mean [K] of a difference, its draws [B, K] and their degrees of freedom."""
    mean: Array = ours.mean(axis=(0, 1)) - theirs.mean(axis=(0, 1))
    if paired:
        return mean, crossed_draws(ours - theirs, plan.draws, plan.seed), freedom(ours - theirs)
    return mean, *difference_draws(ours, theirs, plan.draws, plan.seed)


def _curve(ours: Group, theirs: Group, gold: Sequence[Array], d: Array, plan: Plan, paired: bool) -> Curve:
    """The difference against KL; unpaired seeds leave that of the means of the seeds, with draws of its own."""
    values = gold[0] - gold[1] if paired else gold[0].mean(axis=0, keepdims=True) - gold[1].mean(axis=0, keepdims=True)
    run = ours.runs[0]
    curve = Curve(
        f"{ours.name} less {theirs.name}", "ppo_pooled", "gold_difference", d**2, d**2, run.kl_kind, values,
        run.samples, plan.draws, plan.seed,
    )  # fmt: skip
    curve.draws = _less(gold[0], gold[1], plan, paired)[1]
    return curve
