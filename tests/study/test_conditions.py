"""The study's findings on planted data: planted over-optimisation is found, and nothing else is."""

import numpy as np
import pytest

from bon.gains import gains
from bon.pools import Pools
from core.errors import ArtefactError
from study.analysis.agreement import gold_by_proxy
from study.analysis.agreement import within_prompt_correlation as correlation
from study.analysis.conditions import Plan, baselines, bon_curves, condition_proxies, findings, kl_table
from study.analysis.policies import series_curves, series_findings
from study.analysis.verdict import CANNOT_CONCLUDE, NO_TURN_OVER, OVER_OPTIMISED
from study.design import Condition
from tests.builders.planted import series

N = 256
BT = Condition("bt")
PLAN = Plan(np.unique(np.round(np.geomspace(1, 64, 25)).astype(int)), draws=400, ensembles=("mean", "min"))


def planted(P, bend, seeds=3, noise=0.3, start=0):
    """gold rises by z and falls by bend * (z - 1)^2 above 1, z what the proxies of all seeds see with noise."""
    rng = np.random.default_rng(start)
    z = rng.normal(size=(P, N))
    gold = z - bend * np.maximum(z - 1, 0) ** 2 + 0.5 * rng.normal(size=(P, N)) + 2 * rng.normal(size=(P, 1))
    proxies = {f"bt-{s}": 3 * z + noise * rng.normal(size=(P, N)) + rng.normal(size=(P, 1)) for s in range(seeds)}
    ids = tuple(f"p{i}" for i in range(P))
    return Pools(ids, gold, proxies, length=rng.integers(5, 50, size=(P, N)).astype(float))


def analysed(pools, plan=PLAN):
    proxies = condition_proxies(pools, {BT: sorted(pools.proxies)}, plan)
    best = baselines(pools, plan)[0]
    return {c.name: findings(bon_curves(pools, c.name, p, plan), best) for c, p in proxies.items()}


@pytest.mark.slow
def test_a_planted_peak_is_found_within_its_interval():
    found = analysed(planted(200, bend=1.2))
    large = planted(2000, bend=1.2, start=1)  # the truth, from ten times the prompts
    curve = bon_curves(large, "bt", condition_proxies(large, {BT: sorted(large.proxies)}, PLAN)[BT], PLAN)["gold"]
    truth, peak = curve.x[curve.mean.argmax()], curve.mean.max()
    assert 4 < truth < 32
    for name, f in found.items():
        assert f["verdict"].kind == OVER_OPTIMISED, (name, f["verdict"])
        assert f["peak_n"].lo <= truth <= f["peak_n"].hi and f["drop"].lo > 0
        assert f["gold_at_peak"].mean == pytest.approx(peak, abs=0.1)
    assert set(found) == {"bt", "bt x 3, mean", "bt x 3, min"}
    assert found["bt"]["extremal_gap"].lo > 0  # a line through gold and proxy does not foresee it
    fit = found["bt"]["fit"]
    assert fit.beta.lo > 0 and fit.d_peak.lo <= np.sqrt(np.log(truth) - 1 + 1 / truth) + 0.35


@pytest.mark.slow
def test_data_without_a_peak_are_not_called_over_optimised():
    kinds = [analysed(planted(150, bend=0.0, start=s))["bt"]["verdict"].kind for s in range(6)]
    assert set(kinds) == {NO_TURN_OVER}, kinds
    f = analysed(planted(150, bend=0.0))["bt"]
    assert f["fit"].d_peak is None or f["fit"].d_peak.mean > 1.5
    assert f["efficiency"].lo > 0.7 and f["win_rate"].mean > 0.8 and f["harmed"] < 0.1
    assert abs(f["extremal_gap"].mean) < 0.05  # linear: the regressional part is all


def test_too_few_prompts_cannot_conclude():
    f = analysed(planted(12, bend=0.3, seeds=2))["bt"]
    assert f["verdict"].kind == CANNOT_CONCLUDE and "points on 12 prompts: at least 3 and 20" in f["verdict"].why
    f = analysed(planted(25, bend=0.3, noise=12.0, seeds=2))["bt"]
    assert f["verdict"].kind == CANNOT_CONCLUDE and "would tell, and at least 3 seeds" in f["verdict"].why


def test_curves_do_not_depend_on_offsets_scales_or_order():
    pools = planted(30, bend=0.5)
    first = analysed(pools)["bt"]
    order = np.random.default_rng(0).permutation(N)
    moved = Pools(
        pools.prompt_ids,
        7 * pools.gold[:, order] - 3,
        {k: v[:, order] * 9 + np.arange(30)[:, None] for k, v in pools.proxies.items()},
        length=pools.length[:, order],
    )
    second = analysed(moved)["bt"]
    for key in ("gold", "proxy", "drop", "regret", "win_rate", "length"):
        assert (first[key].lo, first[key].hi) == pytest.approx((second[key].lo, second[key].hi), abs=1e-9)


def test_an_ensemble_of_one_model_is_that_model_and_gold_as_proxy_is_refused():
    pools = planted(20, bend=0.3, seeds=1)
    pools = Pools(pools.prompt_ids, pools.gold, {k: pools.proxies["bt-0"] for k in ("a", "b")})
    condition = Condition("c")
    proxies = condition_proxies(pools, {condition: ["a", "b"]}, PLAN)
    np.testing.assert_allclose(proxies[condition.ensemble("min", 2)][0], gains(pools.proxies["a"]), atol=1e-12)
    with pytest.raises(ArtefactError, match="a scores exactly as gold does"):
        Pools(pools.prompt_ids, pools.gold, {"a": pools.gold.copy()})


def test_kls_and_gold_by_proxy():
    pools = planted(40, bend=0.0, seeds=1)
    tied = {"tied": np.round(gains(pools.proxies["bt-0"]))[None], "free": gains(pools.proxies["bt-0"])[None]}
    rows = {(r["rm"], r["n"]): r for r in kl_table(pools, tied, np.array([1, 4, 16]))}
    assert rows["tied", 16]["pool"] < rows["free", 16]["pool"] <= rows["free", 16]["bound"] + 1e-9
    assert rows["free", 1]["bound"] == 0 and np.isnan(rows["free", 4]["atom"])
    table = gold_by_proxy(pools, tied["free"])
    assert all(b["gold"] > a["gold"] for a, b in zip(table, table[2:], strict=False))
    i = correlation(pools.gold, pools.proxies["bt-0"])
    assert i.lo < 0.89 < i.hi and i.hi < 0.95
    with pytest.raises(ValueError, match="do not vary"):
        gains(np.ones((2, 3)))


def test_series_of_policies_and_rules_to_stop():
    found = series_findings(series_curves("run", series(bend=0.45), Plan(PLAN.ns, draws=400)))
    assert found["verdict"].kind == OVER_OPTIMISED and found["proxy"].lo > 0
    rules = {r["rule"]: r for r in found["rules"]}
    assert rules["final"]["regret"].lo > 0 and rules["oracle"]["regret"] is None
    assert rules["oracle"]["step"] in (2, 3, 4) and rules["blind"]["step"] >= 9
    rising = series_findings(series_curves("run", series(bend=0.0), Plan(PLAN.ns, draws=400)))
    assert rising["verdict"].kind == NO_TURN_OVER
    with pytest.raises(ArtefactError, match="1 of 150 prompts x 12 steps have no sample"):
        series_curves("run", series(0.0)[1:], PLAN)
