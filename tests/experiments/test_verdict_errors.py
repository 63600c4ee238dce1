"""Verdicts on planted curves: what is there is found, and what is not there is not."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bon.estimators import best_of_n, kl_bound, kl_with_atom
from bon.gains import gains, normal_scores
from bon.pools import Pools
from experiments.verdict_errors import World, bend_of, gold_curve, judged, pools, true_drop
from study import checks
from study.analysis.bootstrap import best_above, cross_fitted_peak, crossed_draws
from study.analysis.conditions import Plan, bon_curves, findings, kl_table, prompt_gains
from study.analysis.fits import fit_curve
from study.analysis.policies import stopping_rules
from study.analysis.verdict import (
    CANNOT_CONCLUDE,
    DOES_NOT_HELP,
    HARMS,
    NO_TURN_OVER,
    OVER_OPTIMISED,
    verdict,
)
from study.design import Condition
from study.report import figures
from study.results import results


def kinds(world, times=40):
    return Counter(kind for _, kind in judged(world, times))


@pytest.mark.slow
def test_a_drop_that_only_the_end_of_the_pool_shows_is_found():
    """0.23 SD at n = 64 of pools of 64: judged to a quarter of the pool it was "no turn-over" every time."""
    found = kinds(World(drop=0.23))
    assert found[OVER_OPTIMISED] >= 38, found


@pytest.mark.slow
@pytest.mark.parametrize("world", [World(), World(seeds=1, tails=True), World(prompts=50, ties=True)])
def test_what_does_not_turn_is_rarely_called_over_optimised(world):
    found = kinds(world, 80)
    assert found[OVER_OPTIMISED] <= 4, found  # 5%


@pytest.mark.slow
def test_proxies_that_do_not_help_or_harm_are_named():
    """They were "no turn-over within range" and "over-optimised"."""
    nothing, harm = kinds(World(slope=0.0, seeds=1), 100), kinds(World(slope=-0.3))
    assert nothing[DOES_NOT_HELP] >= 70 and nothing[NO_TURN_OVER] + nothing[OVER_OPTIMISED] <= 5, nothing
    assert harm[HARMS] >= 38, harm


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.0, 0.1, 0.4])
def test_intervals_of_drops_and_regrets_hold_the_truth(drop):
    """The interval of the cross-fitted drop alone lay below the truth in up to half of the studies."""
    world, held = World(drop, prompts=100), 0
    truth = true_drop(replace(world, drop=0.0), bend_of(replace(world, prompts=4000, seeds=1)))
    for curve, _ in judged(world, 100):
        found = curve.evidence()[0].drop
        held += found.lo <= truth <= found.hi
    assert held >= 93, held


def test_no_rule_is_better_than_choosing_by_gold():
    """Its cross-fitted regret was below 0, and its interval excluded 0."""
    rng = np.random.default_rng(0)
    flat = gold_curve(*pools(World(prompts=60, slope=0.0, seeds=1), 0.0, rng))
    rising = replace(flat, values=flat.values + np.linspace(0, 1, len(flat.x)))
    for rule in stopping_rules({"gold": rising, "proxy": rising}):
        assert rule["regret"] is None or (rule["regret"].lo == 0 <= rule["regret"].mean <= rule["regret"].hi)


def test_bounds_of_the_best_point():
    """Against brute force: the lower end is the cross-fitted one, the upper end that of the widest difference."""
    values = np.random.default_rng(0).normal(size=(2, 40, 5)) + np.array([0, 1, 2, 1, 0.5])
    draws, (peak, _) = crossed_draws(values, 400, 3), cross_fitted_peak(values, 3)
    found = best_above(values, draws, peak, 4, seed=3)
    fitted = crossed_draws(peak - values[..., 4:], 400, 3)[:, 0]
    assert found.lo == pytest.approx(np.quantile(fitted, 0.025)) and found.mean == pytest.approx(
        fitted.mean(), abs=0.05
    )
    each = [np.quantile((draws[:, k] - draws[:, 4]), 0.975) for k in range(4)]
    assert found.hi > max(each)  # simultaneous, so above each point's own
    assert best_above(values, draws, peak, 2, seed=3).lo == 0  # nothing lies above the peak


def test_a_curve_that_levels_off_has_no_fitted_peak():
    """It fits a parabola with its peak in the range as well as one that turns."""
    d = np.linspace(0, 2, 30)
    values = (1.2 * (1 - np.exp(-1.6 * d))) + 0.3 * np.random.default_rng(0).normal(size=(1, 200, 1)) * d
    draws, mean = crossed_draws(values, 300, 0), values.mean(axis=(0, 1))
    assert fit_curve(d, mean, draws, "bon", fell=True).d_peak is not None
    assert fit_curve(d, mean, draws, "bon", fell=False).d_peak is None
    ns = np.arange(1, 33)
    saturating = lambda z: np.minimum(z, 1.0)  # noqa: E731
    z = np.random.default_rng(1).normal(size=(150, 32))
    table = Pools(
        tuple(map(str, range(150))), saturating(z) + 0.3 * np.random.default_rng(2).normal(size=z.shape), {"a": z}
    )
    curves = bon_curves(table, "a", gains(z)[None], Plan(ns, draws=300))
    best = bon_curves(table, "oracle", gains(table.gold)[None], Plan(ns, draws=300))["gold"]
    found = findings(curves, best)
    assert found["verdict"].kind == NO_TURN_OVER and found["fit"].d_peak is None and found["fit"].beta.lo > 0


def test_verdicts_name_their_range_and_what_is_missing():
    rng = np.random.default_rng(0)
    curve = gold_curve(*pools(World(0.4), bend_of(World(0.4, prompts=4000, seeds=1)), rng))
    assert verdict(curve.evidence()[0], curve.end).why.endswith("to n = 64 (KL 3.17 nats)")
    # Seeds that disagree: more prompts would not help.
    values = 0.02 * rng.normal(size=(3, 200, 6)) + rng.normal(size=(3, 1, 1)) * np.linspace(0, 0.6, 6)
    seeds = replace(curve, values=values, x=np.arange(1, 7), kl=kl_bound(np.arange(1, 7)))
    found = verdict(seeds.evidence()[0], seeds.end)
    assert found.kind == CANNOT_CONCLUDE and "seeds would tell" in found.why
    prompts = replace(seeds, values=0.8 * rng.normal(size=(3, 30, 6)).mean(axis=0, keepdims=True).repeat(3, axis=0))
    assert "prompts would tell" in verdict(prompts.evidence()[0], prompts.end).why


def test_the_extremal_gap_does_not_depend_on_the_scale_of_the_proxy():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 32))
    gold = z + rng.normal(size=z.shape)
    ns = np.array([1, 4, 32])
    found = []
    for proxy in (z, np.exp(2 * z), np.argsort(np.argsort(z, axis=1), axis=1).astype(float)):
        table = Pools(tuple(map(str, range(60))), gold, {"a": proxy})
        found.append(bon_curves(table, "a", gains(proxy)[None], Plan(ns, draws=100))["regressional"].mean)
    np.testing.assert_allclose(found[1], found[0], atol=1e-12)
    np.testing.assert_allclose(found[2], found[0], atol=1e-12)
    ranks = normal_scores(np.array([[3.0, 1.0, 1.0, 7.0]]))[0]  # ties share ranks 1 and 2
    np.testing.assert_allclose(ranks, [0.31863936, -0.67448975, -0.67448975, 1.15034938], atol=1e-8)


def test_the_kl_of_an_atom_is_a_mean_over_what_is_chosen():
    rng = np.random.default_rng(0)
    proxy, logp = rng.normal(size=(5, 8)), -rng.uniform(0.5, 9, size=(5, 8))
    table = Pools(tuple("abcde"), rng.normal(size=(5, 8)), {"a": proxy}, logp=logp)
    rows = {row["n"]: row["atom"] for row in kl_table(table, {"a": proxy[None]}, np.array([1, 3]))}
    from itertools import combinations

    for n in (1, 3):
        brute = [
            kl_with_atom(n, np.exp(logp[p, max(subset, key=lambda k: proxy[p, k])]))
            for p in range(5) for subset in combinations(range(8), n)
        ]  # fmt: skip
        assert rows[n] == pytest.approx(np.mean(brute))


def test_length_is_no_confound_where_every_proxy_harms_and_harm_is_one_number():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(40, 32))
    proxies = {f"bt-{s}": -gold + rng.normal(size=gold.shape) for s in range(3)}
    table = Pools(
        tuple(f"p{i}" for i in range(40)), gold, proxies, length=rng.integers(5, 50, gold.shape).astype(float)
    )
    found = results(table, {Condition("bt"): sorted(proxies)}, {}, Plan(np.arange(1, 33), draws=100))
    assert found.findings["bt"]["gold"].hi < 0 and found.findings["bt"]["verdict"].kind == HARMS
    assert checks.length_confound(table, found).ok
    drawn = figures.harm(found).axes[0].get_legend().get_texts()[0].get_text()
    assert drawn == f"bt: {found.findings['bt']['harmed']:.0%}"
    curve = next(c for c in found.curves if c.rm == "bt" and c.metric == "gold")
    assert found.findings["bt"]["harmed"] == (prompt_gains(curve) < 0).mean()
    np.testing.assert_allclose(
        prompt_gains(curve), np.mean([best_of_n(p, gains(gold), [32])[:, 0] for p in found.proxies["bt"]], axis=0)
    )
