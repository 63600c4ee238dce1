"""Intervals of accuracies and paired differences: their formulas by brute force, and how often they hold the truth."""

import math

import numpy as np
import pytest

from rm.evaluation.intervals import effective_size, mean_difference, mean_with_intervals, tango_interval

SEEDED = {"draws": 400, "seed": 1}


def tango_statistic(better: int, worse: int, n: int, difference: float) -> float:
    """Tango's statistic, with the nuisance share found on a grid of the multinomial likelihood."""
    grid = np.linspace(1e-9, (1 - abs(difference)) / 2, 200_001) + max(0.0, -difference)  # shares of `worse`
    shares = np.stack([grid + difference, grid, 1 - 2 * grid - difference])
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.array([[better], [worse], [n - better - worse]]) * np.log(np.maximum(shares, 1e-300))
    share = grid[np.argmax(terms.sum(0))]
    variance = n * (2 * share + difference * (1 - difference))
    return (better - worse - n * difference) / math.sqrt(variance)


@pytest.mark.parametrize(("better", "worse", "n"), [(12, 2, 50), (2, 1, 30), (9, 3, 32), (3, 0, 20), (1, 7, 21)])
def test_ends_of_tango_are_where_its_statistic_is_z(better, worse, n):
    lo, hi = tango_interval(better, worse, n)
    assert tango_statistic(better, worse, n, lo) == pytest.approx(1.96, abs=2e-3)
    assert tango_statistic(better, worse, n, hi) == pytest.approx(-1.96, abs=2e-3)
    assert tango_interval(worse, better, n) == pytest.approx((-hi, -lo))


def test_pairs_that_all_agree_prove_no_equality():
    """0 +- z^2 / (n + z^2): with 50 pairs a true difference of 0.07 would show none in 3% of all samples."""
    found = mean_difference(np.zeros(50), [str(i) for i in range(50)], **SEEDED)
    half = 1.96**2 / (50 + 1.96**2)
    assert (found["lo"], found["hi"]) == pytest.approx((-half, half)) and found["differing"] == 0
    of_few_prompts = mean_difference(np.zeros(50), [str(i // 5) for i in range(50)], **SEEDED)
    assert of_few_prompts["hi"] == pytest.approx(1.96**2 / (10 + 1.96**2))
    right = mean_with_intervals(np.ones(50), [str(i // 5) for i in range(50)], **SEEDED)
    assert (right["lo"], right["hi"]) == pytest.approx((10 / (10 + 1.96**2), 1.0))


@pytest.mark.parametrize("n", [20, 50])
@pytest.mark.parametrize("shares", [(0.05, 0.0), (0.02, 0.02), (0.1, 0.02), (0.3, 0.2), (0.2, 0.2)])
def test_exact_coverage_of_tango(n, shares):
    """The sum over all outcomes of n pairs of their probability, where the interval holds the true difference."""
    p, q = shares
    covered = 0.0
    for better in range(n + 1):
        for worse in range(n + 1 - better if q else 1):
            agree = n - better - worse
            ways = math.comb(n, better) * math.comb(n - better, worse)
            chance = ways * p**better * q**worse * (1 - p - q) ** agree
            if chance > 1e-9:
                lo, hi = tango_interval(better, worse, n)
                covered += chance * (lo <= p - q <= hi)
    assert covered > 0.93


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(0.03, 0.01), (0.1, 0.02), (0.3, 0.2)])
@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_coverage_where_prompts_have_several_pairs(shares, alike):
    """60 prompts of 4 pairs; `alike` is the share of the pairs that are copies of their prompt's first one."""
    p, q = shares
    rng, names = np.random.default_rng(0), [str(i // 4) for i in range(240)]
    covered = []
    for _ in range(400):
        drawn = rng.choice([1.0, -1.0, 0.0], size=(60, 4), p=[p, q, 1 - p - q])
        drawn = np.where(rng.random((60, 4)) < alike, drawn[:, :1], drawn)
        found = mean_difference(drawn.ravel(), names, **SEEDED)
        covered.append(found["lo"] <= p - q <= found["hi"])
    assert np.mean(covered) > 0.92


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.6, 0.9, 0.98])
def test_coverage_of_accuracy_over_prompts(accuracy):
    rng, names = np.random.default_rng(0), [str(i // 4) for i in range(240)]
    covered = []
    for _ in range(400):
        hits = (rng.random((60, 4)) < accuracy).astype(float)
        hits = np.where(rng.random((60, 4)) < 0.5, hits[:, :1], hits)
        found = mean_with_intervals(hits.ravel(), names, **SEEDED)
        covered.append(found["lo"] <= accuracy <= found["hi"])
    assert np.mean(covered) > 0.92


def test_effective_size_is_that_of_equal_clusters():
    assert effective_size({"a": [0, 1], "b": [2, 3], "c": [4, 5]}) == 3
    assert 1 < effective_size({"a": [0, 1, 2, 3, 4], "b": [5]}) < 2
