"""Combiners of a condition's seeds side by side, from stored scores: a sweep of their weights takes seconds.

`rm.combine.combiner` names the rules (mean, min, median, uwo:WEIGHT, quantile:Q, soft_min:BETA). Another one,
`length:WEIGHT`, is the mean less WEIGHT standard deviations of the proxy for each standard deviation of length. Members
are centred within prompts and scaled first, since Bradley-Terry leaves both free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import torch

from bon.estimators import best_of_n
from bon.gains import gains
from bon.pools import Pools
from core.errors import DataError
from rm import combine
from study.analysis.bootstrap import Array, crossed_draws, interval
from study.analysis.conditions import Plan

LENGTH = "length"


def rule(text: str) -> Callable[[Array, Array | None], Array]:
    """Members' gains [S, P, N] and gains of length [P, N] -> combined [P, N]; DataError for a rule not known."""
    name, _, number = text.partition(":")
    if name != LENGTH:
        function = combine.combiner(text)
        return lambda members, _: (
            function(torch.from_numpy(members.reshape(len(members), -1))).numpy().reshape(members.shape[1:])
        )
    try:
        weight = float(number)
    except ValueError:
        raise DataError(f"no combiner {text!r}: length:WEIGHT takes a number") from None

    def shortened(members: Array, length: Array | None) -> Array:
        assert length is not None, "`sweep` leaves these rules out where lengths are unknown"
        return members.mean(axis=0) - weight * length

    return shortened


def sweep(
    pools: Pools, proxies: Mapping[str, Array], conditions: Sequence[str], rules: Sequence[str], plan: Plan
) -> list[dict]:
    """Gold of best-of-n at the largest n of every condition by every rule, and against its members' mean.

    Conditions of one member have `length` rules only; those are left out where lengths are unknown or do not vary.

    Returns:
        Rows of rm, rule, name, weight (None where the rule has none), members, n, gold, lo, hi, difference,
        difference_lo, difference_hi; in standard deviations of gold within prompts.
    """
    gold, length = gains(pools.gold), None
    if pools.length is not None and np.ptp(pools.length, axis=1).any():
        length = gains(pools.length)
    n = int(plan.ns[-1])
    rows = []
    for condition in conditions:
        members = proxies[condition]
        plain = best_of_n(members.mean(axis=0), gold, [n])
        for text in rules:
            name, _, number = text.partition(":")
            if (name == LENGTH and length is None) or (name != LENGTH and len(members) < 2):
                continue
            chosen = best_of_n(rule(text)(members, length), gold, [n])
            at, change = (
                interval(float(values.mean()), crossed_draws(values[None], plan.draws, plan.seed)[:, 0])
                for values in (chosen, chosen - plain)
            )
            rows.append(
                {
                    "rm": condition, "rule": text, "name": name, "weight": float(number) if number else None,
                    "members": len(members), "n": n, "gold": at.mean, "lo": at.lo, "hi": at.hi,
                    "difference": change.mean, "difference_lo": change.lo, "difference_hi": change.hi,
                }
            )  # fmt: skip
    return rows


CHOICES = 20
"""Of so many members: of more, as many are drawn."""


def by_members(pools: Pools, proxies: Mapping[str, Array], conditions: Sequence[str], plan: Plan) -> list[dict]:
    """Gold of best-of-n at the largest n by ensembles of 1 to all seeds of a condition, mean over choices of the seeds.

    Returns:
        Rows of rm, rule, members, choices, n, gold, lo, hi; in standard deviations of gold within prompts, with 95%
        intervals over prompts. Those over seeds are not to be had: choices of the same few seeds overlap.
    """
    gold, n, rows = gains(pools.gold), int(plan.ns[-1]), []
    for condition in conditions:
        members = proxies[condition]
        for text in plan.ensembles if len(members) > 1 else ():
            combine_all = rule(text)
            for size in range(1, len(members) + 1):
                chosen = list(combinations(range(len(members)), size))
                if len(chosen) > CHOICES:
                    rng = np.random.default_rng(plan.seed)
                    chosen = [chosen[k] for k in rng.choice(len(chosen), CHOICES, replace=False)]
                values = np.mean([best_of_n(combine_all(members[list(c)], None), gold, [n]) for c in chosen], axis=0)
                at = interval(float(values.mean()), crossed_draws(values[None], plan.draws, plan.seed)[:, 0])
                rows.append({"rm": condition, "rule": text, "members": size, "choices": len(chosen), "n": n,
                             "gold": at.mean, "lo": at.lo, "hi": at.hi})  # fmt: skip
    return rows
