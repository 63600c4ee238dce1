"""Agreement of a proxy with gold, what members share, sweeps of combiners, corrected p-values: against brute force and
planted data."""

from itertools import combinations

import numpy as np
import pytest

from bon.estimators import best_of_n
from bon.gains import gains
from bon.pools import Pools
from core.errors import ArtefactError, DataError
from rm.evaluation.metrics import spearman
from study.analysis.agreement import _spearman_draws as spearman_draws
from study.analysis.agreement import agreement, members, prediction
from study.analysis.bootstrap import crossed_draws, holm, interval, p_value, student_quantile, student_tails
from study.analysis.combiners import rule, sweep
from study.analysis.conditions import Plan, baselines, bon_curves, findings


def pairs_of(x):
    return [(a, b) for a, b in combinations(range(len(x)), 2)]


@pytest.mark.parametrize("levels", [None, 4])
def test_accuracy_kendall_and_spearman_against_all_pairs(levels):
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(6, 9))
    proxy = gold + rng.normal(size=gold.shape)
    if levels:  # ties
        gold, proxy = np.round(gold), np.round(proxy)
    right = count = concordant = proxies = golds = 0.0
    for p, g in zip(proxy, gold, strict=True):
        for a, b in pairs_of(p):
            dp, dg = np.sign(p[a] - p[b]), np.sign(g[a] - g[b])
            concordant, proxies, golds = concordant + dp * dg, proxies + dp**2, golds + dg**2
            if dg:
                right, count = right + (1 + dp * dg) / 2, count + 1
    found = agreement(proxy, gold)
    assert found["accuracy"].mean == pytest.approx(right / count)
    assert found["kendall"].mean == pytest.approx(concordant / np.sqrt(proxies * golds))
    assert found["accuracy"].lo < found["accuracy"].mean < found["accuracy"].hi
    if not levels:  # within one prompt, without ties, it is the textbook's
        one = agreement(np.vstack([proxy[:1]] * 3), np.vstack([gold[:1]] * 3))
        assert one["spearman"].mean == pytest.approx(spearman(proxy[0], gold[0]))


def test_agreement_sees_neither_offsets_of_prompts_nor_the_bulk_in_the_tail():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 64))
    gold = np.where(z < np.quantile(z, 0.75, axis=1, keepdims=True), z, -z)  # the tail is turned round
    found = agreement(z, gold)
    assert found["pearson"].mean > 0 and found["tail_spearman"].hi < -0.9
    moved = agreement(5 * z + 9 * rng.normal(size=(60, 1)), gold)
    for key in ("accuracy", "spearman", "kendall", "tail_spearman"):
        assert moved[key] == found[key]
    assert moved["sd_within"] == pytest.approx(5 * found["sd_within"]) and moved["sd_between"] > 7
    assert agreement(gold + 0.0, gold)["accuracy"].mean == 1 and agreement(-gold, gold)["kendall"].mean == -1


def test_shared_errors_of_members_are_separated_from_their_own():
    rng = np.random.default_rng(0)
    gold, shared = rng.normal(size=(2, 80, 32))
    own = rng.normal(size=(3, 80, 32))
    alike = members(np.stack([gains(gold + shared + 0.1 * o) for o in own]), gold)
    apart = members(np.stack([gains(gold + o) for o in own]), gold)
    assert alike["error_correlation"] > 0.95 and abs(apart["error_correlation"]) < 0.05
    assert alike["correlation"] > 0.95 and apart["correlation"] == pytest.approx(0.5, abs=0.05)


def test_what_predicts_the_outcome_and_what_does_not():
    rng = np.random.default_rng(0)
    rows = [
        {"condition": f"c{i // 3}", "accuracy": i / 30 + 0.01 * rng.normal(), "ece": float(rng.normal()),
         "spearman": None, "gold": i / 10.0} for i in range(30)
    ]  # fmt: skip
    found = {r["metric"]: r for r in prediction(rows, ["gold"])}
    assert found["accuracy"]["spearman"] > 0.95 and found["accuracy"]["lo"] > 0.8
    assert found["ece"]["lo"] < 0 < found["ece"]["hi"] and "spearman" not in found
    assert found["accuracy"]["models"] == 30 and found["accuracy"]["conditions"] == 10
    assert prediction(rows[:3], ["gold"]) == [] and prediction(rows[:6], ["gold"])[0]["lo"] is None


def test_rank_correlations_of_draws_are_those_of_the_repeated_rows():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, 9).astype(float), rng.normal(size=9)
    weights = rng.multinomial(9, np.full(9, 1 / 9), size=20)
    expected = [spearman(np.repeat(x, w), np.repeat(y, w)) for w in weights]
    np.testing.assert_allclose(spearman_draws(x, y, weights), [e for e in expected if e is not None])


def planted(length_pays=0.0):
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=(80, 32)), rng.normal(size=(3, 80, 32))
    length = np.exp(rng.normal(size=(80, 32)))
    proxies = {f"a-{s}": z + n + length_pays * length for s, n in enumerate(noise)}
    return Pools(tuple(f"p{i}" for i in range(80)), z, proxies, length=length)


def test_a_sweep_needs_no_model_and_its_zero_is_the_mean():
    pools, plan = planted(length_pays=1.0), Plan(np.arange(1, 33), draws=200)
    proxies = {"a": np.stack([gains(p) for p in pools.proxies.values()]), "one": gains(pools.proxies["a-0"])[None]}
    rules = ["mean", "uwo:0", "uwo:2", "min", "length:0", "length:0.6"]
    rows = {(r["rm"], r["rule"]): r for r in sweep(pools, proxies, ["a", "one"], rules, plan)}
    assert {rule for rm, rule in rows if rm == "one"} == {"length:0", "length:0.6"}  # of one member nothing is combined
    for text in ("mean", "uwo:0", "length:0"):
        assert rows["a", text]["difference"] == pytest.approx(0, abs=1e-12)
    assert rows["a", "length:0.6"]["difference_lo"] > 0  # the proxies pay for length, which gold does not
    by_hand = best_of_n(proxies["a"].min(axis=0), gains(pools.gold), [32]).mean()
    assert rows["a", "min"]["gold"] == pytest.approx(by_hand) and rows["a", "min"]["n"] == 32
    for wrong in ("uwo", "length:much", "worst"):
        with pytest.raises(DataError, match=f"no combiner '{wrong}'"):
            rule(wrong)


def test_gold_that_is_length_is_gone_beyond_length():
    pools, plan = planted(), Plan(np.arange(1, 33), draws=200)
    long = Pools(pools.prompt_ids, pools.length + 0.01 * pools.gold, {"a": pools.length * 1.0}, length=pools.length)
    found = {
        name: findings(bon_curves(p, "a", gains(p.proxies[k])[None], plan), baselines(p, plan)[0])
        for name, p, k in (("length", long, "a"), ("real", pools, "a-0"))
    }
    assert found["length"]["gold"].lo > 1 and abs(found["length"]["gold_beyond_length"].mean) < 0.05
    assert found["real"]["gold_beyond_length"].mean == pytest.approx(found["real"]["gold"].mean, abs=0.05)


@pytest.mark.slow
def test_p_values_are_students_and_agree_with_the_interval():
    for t, freedom, p in ((12.706, 1, 0.05), (4.303, 2, 0.05), (3.169, 10, 0.01), (1.96, 1e6, 0.05)):
        assert student_tails(t, freedom) == pytest.approx(p, rel=2e-3)
        assert student_quantile(1 - p / 2, freedom) == pytest.approx(t, rel=1e-3)
    rng, wrong, disagree, times = np.random.default_rng(0), 0, 0, 400
    for i in range(times):
        values = rng.normal(size=(3, 1, 1)) + rng.normal(size=(1, 50, 1)) + rng.normal(size=(3, 50, 1))
        p = p_value(values, 300, i)
        wrong += p < 0.05
        disagree += (p < 0.05) != interval(0.0, crossed_draws(values, 300, i)[:, 0]).excludes_zero
    assert wrong / times <= 0.1 and disagree / times <= 0.05, (wrong, disagree)
    assert p_value(np.zeros((1, 5, 1)), 100, 0) == 1.0
    assert p_value(1 + 0.1 * rng.normal(size=(1, 200, 1)), 200, 0) < 1e-6


def test_holm():
    """Holm 1979: 0.01 x 4, 0.013 x 3, 0.02 x 2 (not below the one before), 0.9."""
    found = holm({"c": 0.02, "a": 0.01, "d": 0.9, "b": 0.013})
    assert found == pytest.approx({"a": 0.04, "b": 0.04, "c": 0.04, "d": 0.9})
    assert holm({"a": 0.4, "b": 0.9}) == pytest.approx({"a": 0.8, "b": 0.9}) and holm({}) == {}


def test_a_second_gold_must_be_another_one():
    pools = planted()
    with pytest.raises(ArtefactError, match="second gold scores exactly as the first"):
        Pools(pools.prompt_ids, pools.gold, pools.proxies, second_gold=pools.gold.copy())
    with pytest.raises(ArtefactError, match="a-0 scores exactly as gold does"):
        Pools(pools.prompt_ids, pools.gold, pools.proxies, second_gold=pools.proxies["a-0"].copy())
