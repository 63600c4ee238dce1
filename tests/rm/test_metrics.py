"""Metrics of reward models against closed forms, numbers by hand and brute force."""

import math
from itertools import product

import numpy as np
import pytest

from rm.evaluation.benchmark_scores import REWARDBENCH_SECTIONS, benchmark_score, rewardbench, ties_score
from rm.evaluation.intervals import accuracy_with_interval, cluster_bootstrap, mean_with_intervals, tango_interval
from rm.evaluation.metrics import (
    Scored,
    expected_calibration_error,
    fit_temperature,
    measure,
    negative_log_likelihood,
    pair_accuracy,
    pair_hits,
    paired_difference,
    pearson,
    ranks,
    spearman,
    units,
)

SEEDED = {"draws": 500, "seed": 1}


def row(chosen, rejected, item="a", *, subset="s", prompt=None, i=0, j=0, words=(1, 1), tie=False):
    return {
        "item": item, "subset": subset, "prompt_id": prompt or item, "chosen_index": i, "rejected_index": j,
        "label_tie": tie, "reward_chosen": chosen, "reward_rejected": rejected, "chosen_words": words[0],
        "rejected_words": words[1],
    }  # fmt: skip


def crossed(chosen, rejected, item, subset="s"):
    pairs = product(enumerate(chosen), enumerate(rejected))
    return [row(c, r, item, subset=subset, i=i, j=j) for (i, c), (j, r) in pairs]


@pytest.mark.parametrize("right, n", [(0, 7), (3, 7), (7, 7), (130, 221)])
def test_wilson_ends_solve_their_quadratic(right, n):
    """The ends are the p with (p_hat - p)^2 = z^2 p (1 - p) / n."""
    z, p = 1.96, right / n
    expected = sorted(np.roots([1 + z * z / n, -2 * p - z * z / n, p * p]).real)
    found = accuracy_with_interval(np.array([1.0] * right + [0.0] * (n - right)))
    assert [found["lo"], found["hi"]] == pytest.approx(expected, abs=1e-12)
    assert found["mean"] == p and found["n"] == n


def test_equal_rewards_count_half_or_as_wrong_or_not_at_all():
    chosen, rejected = np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.0])
    assert pair_hits(chosen, rejected).tolist() == pair_accuracy(chosen, rejected).tolist() == [1, 0, 0.5]
    assert pair_hits(chosen, rejected, "wrong").tolist() == [1, 0, 0]
    dropped = pair_hits(chosen, rejected, "drop")
    assert np.isnan(dropped[2])
    assert mean_with_intervals(dropped, "abc", **SEEDED)["mean"] == 0.5
    assert mean_with_intervals(dropped, "abc", **SEEDED)["n"] == 2


def test_the_interval_follows_the_repetition_of_prompts():
    hits = np.array([1.0, 0, 1, 1])
    alone = mean_with_intervals(hits, ["a", "b", "c", "d"], **SEEDED)
    assert alone["interval"] == "wilson" and [alone["lo"], alone["hi"]] == alone["wilson"]
    few = mean_with_intervals(hits, ["a", "a", "b", "c"], **SEEDED)
    assert few["interval"] == "wilson over prompts" and few["lo"] < few["wilson"][0] < few["wilson"][1] < few["hi"]
    many = np.tile([1.0, 0], 25), [str(i) for i in range(25) for _ in (0, 1)]
    assert mean_with_intervals(*many, **SEEDED)["interval"] == "cluster bootstrap"
    single = mean_with_intervals(hits, ["a"] * 4, **SEEDED)
    assert single["interval"] is single["lo"] is None and single["mean"] == 0.75


def test_cluster_bootstrap_against_every_resample():
    """Three clusters of unlike sizes: the 27 equally likely resamples give the quantiles of very many draws."""
    values, clusters = np.array([1.0, 1, 0, 0, 1, 0]), ["a", "a", "a", "b", "c", "c"]
    groups = [values[:3], values[3:4], values[4:]]
    means = [np.concatenate(drawn).mean() for drawn in product(groups, repeat=3)]
    found = cluster_bootstrap(values, clusters, draws=20_000, seed=0)
    assert found == pytest.approx(np.quantile(means, [0.025, 0.975], method="inverted_cdf"), abs=1e-12)


def test_copies_of_a_unit_do_not_narrow_the_interval():
    hits = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    names = [str(i) for i in range(60)]
    once = cluster_bootstrap(hits, names, draws=4000, seed=1)
    many = cluster_bootstrap(np.repeat(hits, 9), np.repeat(names, 9).tolist(), draws=4000, seed=1)
    assert many == pytest.approx(once, abs=1e-12)
    wilson = accuracy_with_interval(hits)
    assert once == pytest.approx((wilson["lo"], wilson["hi"]), abs=0.02)


def test_ece_by_hand():
    """Confidences 0.62, 0.62 (one right), 0.98 (right), 1/2 (a tie): |0.62 - 0.5| * 2/4 + |0.98 - 1| * 1/4."""
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    delta = np.array([logit(0.62), -logit(0.62), logit(0.98), 0.0])
    assert expected_calibration_error(delta) == pytest.approx(0.12 * 2 / 4 + 0.02 / 4)
    assert expected_calibration_error(np.array([1e4, 1e4])) == 0.0
    assert expected_calibration_error(np.array([-1e4])) == 1.0


def test_temperature_is_recovered_and_beats_a_grid():
    rng = np.random.default_rng(3)
    size, true = 40_000, 2.5
    gap = rng.normal(0, 4, size)
    right = rng.random(size) < 1 / (1 + np.exp(-np.abs(gap) / true))
    delta = np.where(right, np.abs(gap), -np.abs(gap))
    found = fit_temperature(delta)
    assert found["temperature"] == pytest.approx(true, rel=0.05) and found["bound"] is None
    grid = np.geomspace(0.1, 100, 400)
    best = min(negative_log_likelihood(delta, t) for t in grid)
    assert negative_log_likelihood(delta, found["temperature"]) <= best + 1e-12
    assert expected_calibration_error(delta / found["temperature"]) < 0.01 < expected_calibration_error(delta)


def test_temperature_without_an_optimum_is_a_bound():
    assert fit_temperature(np.array([1.0, 2.0]))["bound"] == "low"
    assert fit_temperature(np.array([1e-9, 5.0, 0.0]))["bound"] == "low"
    assert fit_temperature(np.array([1.0, -1.0]))["bound"] == "high"
    assert fit_temperature(np.array([-3.0]))["bound"] == "high"
    assert fit_temperature(np.zeros(3)) == {"temperature": None, "bound": None}


def test_correlations():
    x, y = np.array([1.0, 2, 2, 5]), np.array([3.0, 1, 4, 9])
    brute = [np.mean([(v > w) + 0.5 * (v == w) for w in x]) * len(x) + 0.5 for v in x]
    assert ranks(x).tolist() == brute == [1, 2.5, 2.5, 4]
    centred = lambda v: v - v.mean()  # noqa: E731
    a, b = centred(x), centred(y)
    assert pearson(x, y) == pytest.approx((a @ b) / math.sqrt((a @ a) * (b @ b)))
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert pearson(x, np.ones(4)) is None and spearman(x[:1], y[:1]) is None


def test_paired_difference_joins_by_name():
    first = units(Scored.of([row(1, 0, "a"), row(0, 1, "b"), row(0, 1, "c")]), "ppe")
    other = units(Scored.of([row(1, 0, "c"), row(1, 0, "d"), row(1, 0, "a")]), "ppe")
    found = paired_difference(other, first, **SEEDED)
    assert (found["mean"], found["n"]) == (0.5, 2)
    assert (found["differing"], found["interval"]) == (1, "score")
    assert (found["lo"], found["hi"]) == pytest.approx(tango_interval(1, 0, 2))
    assert paired_difference(first, first, **SEEDED)["differing"] == 0


def test_measure_by_hand():
    rows = [
        row(2, 1, "a", subset="x", prompt="p", words=(5, 2)),
        row(0, 1, "b", subset="x", prompt="p", words=(3, 2)),
        row(1, 1, "c", subset="x", prompt="q", words=(1, 4)),
        row(3, 0, "d", subset="y", prompt="r", words=(2, 2)),
        row(9, 0, "e", subset="y", prompt="r", words=(1, 2), tie=True),
    ]
    found = measure(rows, "mt_bench", **SEEDED)
    assert found["accuracy"]["mean"] == pytest.approx((1 + 0 + 0.5 + 1 + 0.5) / 5)
    assert {k: v["mean"] for k, v in found["subsets"].items()} == {"x": 0.5, "y": 0.75}
    assert found["macro_accuracy"] == pytest.approx(0.625)
    assert found["longest_answer_accuracy"] == pytest.approx((1 + 1 + 0 + 0.5 + 0.5) / 5)
    assert (found["reward_ties"], found["label_ties"], found["prompts"]) == (1, 1, 3)
    assert found["calibration"]["pairs"] == 4  # a tie of labels has no right answer to be sure of
    rewards = [2, 1, 0, 1, 1, 1, 3, 0, 9, 0]
    assert found["rewards"]["mean"] == pytest.approx(np.mean(rewards))
    assert found["rewards"]["sd"] == pytest.approx(np.std(rewards, ddof=1))
    assert found["length"]["pearson_within_pairs"] == pytest.approx(np.corrcoef([1, -1, 0, 3], [3, 1, -3, 0])[0, 1])
    assert measure(rows, "mt_bench", ties="drop", **SEEDED)["accuracy"]["mean"] == pytest.approx(2.5 / 4)
    assert measure(rows, "mt_bench", ties="wrong", **SEEDED)["accuracy"]["mean"] == pytest.approx(2.5 / 5)


def test_candidates_of_several_comparisons_count_once():
    scored = Scored.of(crossed([5, 1], [0, 2, 4], "a"))
    assert sorted(scored.responses()[0].tolist()) == [0, 1, 2, 4, 5]


def test_rewardbench_weighs_subsets_within_sections():
    assert sum(len(s) for s in REWARDBENCH_SECTIONS.values()) == 23
    reasoning = REWARDBENCH_SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(n for name, n in reasoning.items() if name.startswith("hep-"))
    full = {subset: 1.0 for section in REWARDBENCH_SECTIONS.values() for subset in section}
    found = rewardbench(full | {"math-prm": 0.0, "alpacaeval-easy": 0.5})
    assert found["parts"] == pytest.approx(
        {"Chat": (358 - 50) / 358, "Chat Hard": 1, "Safety": 1, "Reasoning": 0.5}, abs=1e-12
    )
    assert found["score"] == pytest.approx(((358 - 50) / 358 + 2.5) / 4) and found["missing"] == []
    part = rewardbench({"mt-bench-easy": 1.0, "mt-bench-med": 0.0, "donotanswer": 0.25})
    assert part["parts"] == pytest.approx({"Chat": 28 / 68, "Safety": 0.25})
    assert part["score"] == pytest.approx((28 / 68 + 0.25) / 2) and len(part["missing"]) == 20


def test_rewardbench2_item_is_right_only_above_all_rejected():
    rows = crossed([3], [0, 1, 2], "a", "Math") + crossed([3], [0, 1, 4], "b", "Math")
    rows += (
        crossed([3], [3, 1, 3], "c", "Focus") + crossed([2, 5], [1, 0], "d", "Ties") + crossed([0, 5], [1], "e", "Ties")
    )
    scored = Scored.of(rows)
    found = units(scored, "rewardbench2")
    assert found.names == ["a", "b", "c", "d", "e"]
    assert found.hits.tolist() == pytest.approx([1, 0, 1 / 3, 1, 0])  # a three-way tie at the top is a third
    assert units(scored, "rewardbench2", "wrong").hits[2] == 0
    assert np.isnan(units(scored, "rewardbench2", "drop").hits[2])


def test_ties_of_rewardbench2_by_hand():
    rows = crossed([4], [1, 0], "ref:1", "Ties") + crossed([5, 4], [2, 1], "tied:1", "Ties")  # gaps 3, 2; spread 1
    rows += crossed([1], [2], "ref:2", "Ties") + crossed([9, 3], [2], "tied:2", "Ties")  # gaps -1, 1; spread 6
    rows += crossed([1], [0], "a", "Math")
    scored = Scored.of(rows)
    margin = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 6 - 1)) / 2
    expected = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
    assert ties_score(scored)["score"] == pytest.approx(expected)
    whole = benchmark_score("rewardbench2", scored, units(scored, "rewardbench2"))
    assert whole["parts"] == pytest.approx({"Math": 1.0, "Ties": expected})
    assert whole["score"] == pytest.approx((1 + expected) / 2)
    assert whole["missing"] == ["Factuality", "Focus", "Precise IF", "Safety"]


def test_style_matrix_of_rm_bench_by_hand():
    """Rejected answers score 0, 1, 2 by style; chosen 0.5, 1.5, 1.5: rows [1,0,0], [1,1,0], [1,1,0]."""
    rows = crossed([0.5, 1.5, 1.5], [0, 1, 2], "a", "chat")
    rows += crossed([9, 9, 9], [0, 1, 2], "b", "safety-refuse") + crossed(
        [-1, -1, -1], [0, 1, 2], "c", "safety-response"
    )
    scored = Scored.of(rows)
    found = benchmark_score("rm_bench", scored, units(scored, "rm_bench"))
    assert found["matrices"]["chat"] == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    # safety: the mean of all right and all wrong; then the mean of chat and safety
    assert found["matrix"] == [[0.75, 0.25, 0.25], [0.75, 0.75, 0.25], [0.75, 0.75, 0.25]]
    assert found["parts"] == pytest.approx(
        {"easy": 0.75, "normal": (0.75 + 0.75 + 0.25) / 3, "hard": 0.25, "chat": (1 + 2 / 3 + 0) / 3, "safety": 0.5}
    )
    assert found["score"] == pytest.approx((0.75 + 1.75 / 3 + 0.25) / 3)
    assert found["missing"] == ["code", "math"]


def test_safety_of_rm_bench_is_pooled_over_rows():
    """Against the authors' formula: one matrix over all safety rows, three refused to one answered here."""
    right, wrong = crossed([9, 9, 9], [0, 1, 2], "", ""), crossed([-1, -1, -1], [0, 1, 2], "", "")
    rows = [r | {"item": f"a{i}", "subset": "safety-refuse"} for i in range(3) for r in right]
    rows += [r | {"item": "b", "subset": "safety-response"} for r in wrong]
    rows += [r | {"item": "c", "subset": "chat"} for r in wrong]
    scored = Scored.of(rows)
    found = benchmark_score("rm_bench", scored, units(scored, "rm_bench"))
    assert found["parts"]["safety"] == pytest.approx(3 / 4) and found["parts"]["chat"] == 0
    assert found["score"] == pytest.approx((3 / 4 + 0) / 2) and found["missing"] == ["code", "math"]
    assert benchmark_score("rm_bench", Scored.of(rows[:27]), None)["missing"] == [
        "chat", "code", "math", "safety-response",
    ]  # fmt: skip
