"""Policies of several seeds together, and one condition less another at equal KL: planted differences are found."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bon.pools import Pools
from study import files
from study.analysis.conditions import Plan
from study.analysis.policy_differences import compare, comparisons
from study.analysis.pooled import at_kl, grouped, pooled_curves, pooled_findings, reached
from study.analysis.verdict import CANNOT_CONCLUDE, NO_TURN_OVER, OVER_OPTIMISED, Verdict
from study.design import Condition
from study.records import Series
from study.results import results
from tests.builders.planted import pools, series
from tests.builders.studies.policies import KLS, policies

PLAN = Plan(np.arange(1, 33), draws=200)
ALONE = Verdict(OVER_OPTIMISED, "")


def found(group):
    return pooled_findings(group, pooled_curves(group, PLAN), [ALONE] * len(group.runs))


def test_values_at_a_kl_are_those_between_its_checkpoints():
    """By hand: half-way in sqrt(KL) between two checkpoints; at a checkpoint, its own mean."""
    (run,) = policies(np.random.default_rng(0), "a", seeds=1, prompts=30).runs
    d = np.sqrt(run.kl.mean(axis=0))
    mean = at_kl(run, "gold", run.prompts, np.array([d[3], (d[3] + d[4]) / 2])).mean(axis=0)
    gold = run.gains["gold"].mean(axis=0)
    assert mean == pytest.approx([gold[3], (gold[3] + gold[4]) / 2])


def test_a_prompts_share_holds_the_error_of_the_kl():
    """Leaving one prompt out changes the interpolated mean by what that prompt contributes."""
    (run,) = policies(np.random.default_rng(1), "a", seeds=1, prompts=400, beta=0.15).runs
    d, P = np.array([1.7, 3.3]), 400
    shares = at_kl(run, "gold", run.prompts, d)
    naive = np.abs(run.gains["gold"][:, 5] - shares[:, 1]).mean()
    for out in (0, 17, 200):
        keep = np.arange(P) != out
        fewer = replace(run, prompts=[run.prompts[i] for i in np.flatnonzero(keep)], kl=run.kl[keep],
                        gains={k: v[keep] for k, v in run.gains.items()})  # fmt: skip
        change = (at_kl(fewer, "gold", fewer.prompts, d) * 1.0).mean(axis=0) - shares.mean(axis=0)
        assert change == pytest.approx((shares.mean(axis=0) - shares[out]) / (P - 1), abs=2e-4) and naive > 0.1


def test_a_kl_that_falls_back_counts_the_first_time_that_it_was_reached():
    (run,) = policies(np.random.default_rng(0), "a", seeds=1).runs
    kl = run.kl.copy()
    kl[:, 4] = kl[:, 2]
    steps, d = reached(replace(run, kl=kl))
    assert steps.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and (np.diff(d) > 0).all()


def test_a_planted_turn_is_found_in_seeds_together_and_a_rise_is_not_called_one():
    rng = np.random.default_rng(0)
    turning = found(policies(rng, "a", beta=0.1, seeds=4, prompts=100))
    assert turning["verdict"].kind == OVER_OPTIMISED and turning["seeds"] == 4
    assert turning["peak_kl"].lo <= 0.5**2 / (2 * 0.1) ** 2 <= turning["peak_kl"].hi  # d* = alpha / (2 beta)
    assert turning["proxy_since_peak"].lo > 0.5 and turning["drop"].lo > 0
    assert turning["kl"] <= 1.2 * KLS[-1] and "to a KL of" in turning["verdict"].why
    rising = found(policies(rng, "a", alpha=0.3, beta=0.0, seeds=5, prompts=100))
    assert rising["verdict"].kind == NO_TURN_OVER


def test_one_seed_says_what_it_cannot_tell():
    alone = found(policies(np.random.default_rng(0), "a", beta=0.1, seeds=1, prompts=100))
    assert alone["verdict"].kind == CANNOT_CONCLUDE and alone["drop"].lo > 0
    assert alone["verdict"].why == "one policy, over-optimised by itself: another seed may turn elsewhere"


def test_the_range_is_what_all_seeds_reach_on_the_prompts_that_all_have():
    group = policies(np.random.default_rng(0), "a", seeds=2, prompts=30)
    slow = replace(group.runs[0], kl=group.runs[0].kl / 4)
    other = replace(group.runs[1], prompts=["q", *group.runs[1].prompts[1:]])
    curve = pooled_curves(replace(group, runs=(slow, other)), PLAN)["gold"]
    assert curve.kl[-1] == pytest.approx(slow.kl.mean(axis=0)[-1]) and curve.values.shape[:2] == (2, 29)
    none = replace(other, kl=other.kl + 100)
    assert pooled_curves(replace(group, runs=(slow, none)), PLAN) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "known"), [(3, True), (5, True), (3, False)])
def test_intervals_of_a_difference_at_equal_kl_hold_a_planted_one(seeds, known):
    """200 simulations: beta of the second is larger by 0.05, so gold differs by 0.05 KL at each KL. Both have the same
    prompts; seeds are paired where they are known. At equal steps the KLs differ, and so do the answers."""
    at_end, over, off = [], [], []
    for sim in range(200):
        rng = np.random.default_rng(sim)
        gains = 0.3 * rng.normal(size=60)
        ours, theirs = (policies(rng, n, beta=b, seeds=seeds, gains=gains) for n, b in (("a", 0.05), ("b", 0.1)))
        ours = ours if known else replace(ours, seeds=(None,) * seeds)
        facts, curve = compare(ours, theirs, PLAN)
        assert facts["paired"] is known
        kls = np.linspace(0, np.sqrt(facts["kl"]), len(curve.x)) ** 2
        truth, mean = 0.05 * facts["kl"], 0.05 * kls.mean()
        at_end.append(facts["at_equal_kl"].lo <= truth <= facts["at_equal_kl"].hi)
        over.append(facts["over_range"].lo <= mean <= facts["over_range"].hi)
        off.append(facts["at_equal_kl"].mean - truth)
    assert 0.9 <= np.mean(at_end) <= 0.99 and 0.9 <= np.mean(over) <= 0.99
    assert abs(np.mean(off)) < 4 * np.std(off) / np.sqrt(len(off)) + 0.02


def test_what_is_compared():
    """Conditions with their baseline, ensembles with their members, penalties with the smallest one."""
    rng = np.random.default_rng(0)
    runs = []
    for condition in (BT, GRM, GRM.ensemble("min", 3)):
        for run, seed in zip(policies(rng, condition.name, seeds=2, prompts=20).runs, (0, 1), strict=True):
            runs += [(run, condition, coef, seed) for coef in (0.0, 0.1)]
    pairs = comparisons(grouped(runs), {BT: BT, GRM: BT})
    said = {(a.name, b.name) for a, b in pairs}
    assert said == {("grm-kl0", "bt-kl0"), ("grm-kl0.1", "bt-kl0.1"), ("grm x 3, min-kl0", "grm-kl0"),
                    ("grm x 3, min-kl0.1", "grm-kl0.1"), ("bt-kl0.1", "bt-kl0"), ("grm-kl0.1", "grm-kl0"),
                    ("grm x 3, min-kl0.1", "grm x 3, min-kl0")}  # fmt: skip


BT, GRM = Condition("bt"), Condition("grm")


@pytest.fixture(scope="module")
def study():
    table, runs = pools(), {}
    for condition, bend in ((BT, 0.5), (GRM, 0.3)):
        for seed in range(2):
            name = f"{condition.name}-seed{seed}"
            runs[f"{name}-kl0"] = Series(series(bend, P=40, start=seed), name, condition, 0.0, seed)
    conditions = {c: [f"{c.name}-seed{s}" for s in range(3)] for c in (BT, GRM)}
    return results(table, conditions, runs, PLAN, {BT: BT, GRM: BT})


def test_a_study_pools_its_policies_and_writes_them(study, tmp_path):
    assert study.pooled.keys() == {"bt-kl0", "grm-kl0"} and study.pooled["bt-kl0"]["seeds"] == 2
    assert study.pooled["bt-kl0"]["policies"] == ["bt-seed0-kl0", "bt-seed1-kl0"]
    (facts,) = study.policy_differences
    assert (facts["policies"], facts["less"], facts["paired"]) == ("grm-kl0", "bt-kl0", True)
    assert facts["at_equal_kl"].mean > 0 and facts["p_holm"] == facts["p"] and facts["step"] == 11
    files.write(tmp_path, study)
    written = json.loads((tmp_path / "pooled.json").read_text())
    assert written["differences"][0]["at_equal_kl"]["mean"] == facts["at_equal_kl"].mean
    assert {"policy_differences.csv", "pooled.csv"} <= {p.name for p in tmp_path.iterdir()}
    methods = {(r["rm"], r["method"], r["metric"]) for r in study.rows}
    assert ("grm-kl0 less bt-kl0", "ppo_pooled", "gold_difference") in methods
    assert study.condition_of("grm-kl0") == study.condition_of("grm-seed1-kl0") == "grm"


def test_several_samples_a_prompt_count_as_one_prompt():
    """Policies evaluated with two samples a prompt have the interval of as many prompts, not of twice as many."""
    rows = series(0.3, P=40)
    twice = [{**r, "sample_id": k} for r in rows for k in (0, 1)]
    table = Pools(tuple(f"p{i:03d}" for i in range(40)), pools().gold, {"bt": pools().proxies["bt-seed0"]})
    once, double = (
        results(table, {BT: ["bt"]}, {"r": Series(r, "bt", BT, 0.0, 0)}, PLAN).pooled["bt-kl0"] for r in (rows, twice)
    )
    assert once["gold"] == double["gold"] and once["prompts"] == double["prompts"] == 40
