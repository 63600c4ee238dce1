"""Intervals hold the truth as often as they say; peaks and fits are those of data whose truth is known."""

from itertools import combinations

import numpy as np
import pytest

from bon.estimators import best_of_n
from bon.soft import soft_best_of_n
from study.analysis.bootstrap import (
    cross_fitted_peak,
    crossed_draws,
    interval,
    pointwise,
    simultaneous,
    student_quantile,
)
from study.analysis.fits import columns, fit_curve, least_squares, peak, predict


@pytest.mark.slow
@pytest.mark.parametrize(("S", "seed_sd", "prompt_sd"), [(1, 0.0, 1.0), (3, 1.0, 1.0), (4, 0.3, 0.1), (5, 0.0, 1.0)])
def test_intervals_cover_at_their_nominal_rate(S, seed_sd, prompt_sd):
    """True mean 0; effects of seeds, of prompts and of both. 90 to 98 of 100 intervals at 95% must hold it."""
    rng, hits, held, times, P = np.random.default_rng(S), 0, 0, 400, 60
    slope = np.array([0.5, 1.0, 1.5])
    for i in range(times):
        values = (
            seed_sd * rng.normal(size=(S, 1, 1)) * slope
            + prompt_sd * rng.normal(size=(1, P, 1)) * slope[::-1]
            + 0.5 * rng.normal(size=(S, P, 3))
        )
        draws, mean = crossed_draws(values, 300, i), values.mean(axis=(0, 1))
        lo, hi = pointwise(draws)
        hits += lo[1] <= 0 <= hi[1]
        lo, hi = simultaneous(mean, draws)
        held += bool(((lo <= 0) & (hi >= 0)).all())
    assert 0.90 <= hits / times <= 0.98, hits / times
    assert 0.90 <= held / times <= 0.99, held / times


def test_quantiles_of_student():
    """Tables have 12.706, 4.303, 2.571 and 1.962 for 1, 2, 5 and 1,000 degrees of freedom."""
    for freedom, quantile in ((1, 12.706), (2, 4.303), (5, 2.571), (1000, 1.962)):
        assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)


def test_draws_are_paired_and_bands_are_wider_than_points():
    values = np.random.default_rng(0).normal(size=(3, 40, 5))
    a, b = crossed_draws(values, 500, 7), crossed_draws(values + 1, 500, 7)
    np.testing.assert_allclose(b - a, 1, atol=1e-12)
    mean = values.mean(axis=(0, 1))
    lo, hi = pointwise(a)
    band_lo, band_hi = simultaneous(mean, a)
    assert (band_hi - band_lo > hi - lo).all()
    still = simultaneous(np.array([0.0, 1.0]), np.array([[0.0, 0.5], [0.0, 1.5], [0.0, 1.1]]))
    assert still[0][0] == still[1][0] == 0 and still[0][1] < 1 < still[1][1]
    with pytest.raises(ValueError, match="two prompts at least"):
        crossed_draws(values[:, :1], 10, 0)


def test_a_peak_found_in_noise_is_no_drop():
    """max - last of a flat noisy curve is positive; measured on other prompts than it was chosen on it is not."""
    rng, naive, fitted = np.random.default_rng(0), [], []
    for i in range(60):
        values = rng.normal(size=(1, 40, 12))
        curve = values.mean(axis=(0, 1))
        naive.append(curve.max() - curve[-1])
        fitted.append((cross_fitted_peak(values, i)[0] - values[..., -1:]).mean())
    assert np.mean(naive) > 0.2
    assert abs(np.mean(fitted)) < 3 * np.std(fitted) / np.sqrt(len(fitted))
    falls = values + np.array([0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1.0])
    top, chosen = cross_fitted_peak(falls, 0)
    drop = top - falls[..., -1:]
    assert drop.mean() == pytest.approx(5, abs=0.6) and top.mean() == pytest.approx(6, abs=0.4)
    assert set(chosen) == {6}


@pytest.mark.parametrize(("form", "truth"), [("bon", (1.0, 0.3)), ("rl", (0.8, 0.5))])
def test_fits_recover_planted_curves_and_their_peaks(form, truth):
    d = np.linspace(0.3, 3, 30)
    exact = predict(np.array(truth), d, form)
    np.testing.assert_allclose(least_squares(d, exact, form), truth, atol=1e-12)
    at, top = peak(np.array(truth), form)
    fine = np.linspace(0.01, 6, 200_001)
    curve = predict(np.array(truth), fine, form)
    assert fine[curve.argmax()] == pytest.approx(at, abs=1e-4) and curve.max() == pytest.approx(top, abs=1e-8)
    rng = np.random.default_rng(0)
    noisy = exact + 0.3 * rng.normal(size=(1, 400, 1)) * d + 0.5 * rng.normal(size=(1, 400, len(d)))
    found = fit_curve(d, noisy.mean(axis=(0, 1)), crossed_draws(noisy, 500, 1), form, fell=True)
    for name, value in zip(("alpha", "beta", "d_peak", "gold_peak"), (*truth, at, top), strict=True):
        i = getattr(found, name)
        assert i.lo <= value <= i.hi and i.hi - i.lo < 1.0, (name, i)
    assert found.extrapolation_error.lo <= 0 <= found.extrapolation_error.hi
    assert abs(found.extrapolation_error_linear) > abs(found.extrapolation_error.mean)


def test_a_curve_that_does_not_turn_has_no_peak():
    d, rng = np.linspace(0, 2, 20), np.random.default_rng(0)
    for curve in (0.5 * d, d - 0.1 * d**2):  # never falls; peaks at d = 5, beyond the range
        values = curve + 0.2 * rng.normal(size=(1, 200, 20))
        found = fit_curve(d, values.mean(axis=(0, 1)), crossed_draws(values, 300, 1), "bon", fell=True)
        assert found.d_peak is None and found.gold_peak is None and found.alpha.lo > 0
    assert peak(np.array([1.0, -0.1]), "bon")[0] == np.inf and peak(np.array([1.0, 0.0]), "rl")[0] == np.inf
    assert fit_curve(d[:4], curve[:4], values[0, :, :4], "bon", fell=True) is None
    with pytest.raises(ValueError, match="no form 'ppo'"):
        columns(d, "ppo")
    with pytest.raises(ValueError, match="leave points with d = 0 out"):
        columns(d, "rl")


def test_fits_cover_where_points_share_a_pool():
    """Points of one best-of-n curve are one pool: alpha and beta hold the truth in 88 to 99 of 100 studies."""
    rng, times, hits = np.random.default_rng(0), 120, np.zeros(2)
    ns, N = np.array([2, 3, 4, 6, 8, 12, 16]), 64
    d = np.sqrt(np.log(ns) - (ns - 1) / ns)
    gain = lambda x: best_of_n(x[0], x[1], ns) - x[1].mean(axis=1, keepdims=True)  # noqa: E731

    def pools(P):
        z = rng.normal(size=(P, N))
        return z, 0.6 * z - 0.2 * (z**2 - 1) + rng.normal(size=(P, N))

    truth = least_squares(d, np.mean([gain(pools(4000)).mean(axis=0) for _ in range(5)], axis=0), "bon")
    for i in range(times):
        values = gain(pools(60))[None]
        draws = least_squares(d, crossed_draws(values, 300, i), "bon")
        for j in range(2):
            found = interval(0.0, draws[:, j])
            hits[j] += found.lo <= truth[j] <= found.hi
    assert ((hits / times >= 0.88) & (hits / times <= 0.99)).all(), hits / times


@pytest.mark.slow
def test_soft_best_of_n_against_all_subsets():
    rng = np.random.default_rng(0)
    proxy, value = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    for temperature in (0.3, 2.0):
        found = soft_best_of_n(proxy, value, [1, 2, 3], temperature, draws=6000)
        for p in range(2):
            for k, n in enumerate((1, 2, 3)):
                brute = []
                for subset in map(list, combinations(range(6), n)):
                    w = np.exp(proxy[p, subset] / temperature)
                    brute.append(w @ value[p, subset] / w.sum())
                assert found[p, k] == pytest.approx(np.mean(brute), abs=0.03)
    np.testing.assert_array_equal(soft_best_of_n(proxy, value, [2, 4], 0.0), best_of_n(proxy, value, [2, 4]))
    np.testing.assert_allclose(
        soft_best_of_n(proxy, value, [3], 1e-6, draws=8000), best_of_n(proxy, value, [3]), atol=0.04
    )
    np.testing.assert_allclose(soft_best_of_n(proxy, value, [6], 1e9)[:, 0], value.mean(axis=1), atol=1e-6)
    with pytest.raises(ValueError, match="temperature"):
        soft_best_of_n(proxy, value, [2], -1.0)


def test_the_crossed_bootstrap_covers_seeds_and_prompts():
    """Its spread is that of a mean over both: sqrt(var_seed / S + var_prompt / P) where effects add up."""
    rng = np.random.default_rng(0)
    seeds, prompts = rng.normal(size=(8, 1, 1)), 3 * rng.normal(size=(1, 90, 1))
    draws = crossed_draws(seeds + prompts, 4000, 1)
    lo, hi = np.quantile(draws, [0.025, 0.975], axis=0)
    parts = seeds.var(ddof=1) / 8, prompts.var(ddof=1) / 90
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 7 + parts[1] ** 2 / 89)
    expected = student_quantile(0.975, freedom) * np.sqrt(sum(parts))
    assert draws.mean() == pytest.approx(seeds.mean() + prompts.mean(), abs=0.05)
    assert (hi - lo)[0] / 2 == pytest.approx(expected, rel=0.08)
    low, high = np.quantile(crossed_draws(seeds[:1] + prompts, 4000, 1), [0.025, 0.975], axis=0)
    assert (high - low)[0] / 2 == pytest.approx(1.96 * prompts.std() / np.sqrt(90), rel=0.08)
