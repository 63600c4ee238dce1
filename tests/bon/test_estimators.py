"""bon.estimators against oracles that share no code with it: enumeration of every subset, exact
integers, numerical integrals and plain simulation."""

import itertools
import math

import numpy as np
import pytest

from bon.estimators import (
    best_of_n,
    count_lower_in_both,
    kl_bound,
    kl_discrete,
    kl_pool,
    kl_with_atom,
    oracle,
    subset_weights,
    win_rate,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def win(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


def brute_force(proxy, gold, n):
    """(value, win rate) over all n-subsets, ties in proxy broken uniformly at random."""
    values, wins = [], []
    everyone = range(len(proxy))
    for subset in itertools.combinations(everyone, n):
        top = max(proxy[i] for i in subset)
        best = [i for i in subset if proxy[i] == top]
        values.append(np.mean([gold[i] for i in best]))
        outside = [j for j in everyone if j not in subset]
        wins += [np.mean([win(gold[i], gold[j]) for i in best]) for j in outside]
    return np.mean(values), np.mean(wins) if wins else math.nan


def pools(N, levels, P=4, seed=0):
    """proxy, gold [P, N]; `levels` distinct values for ties, None for continuous scores."""
    rng = np.random.default_rng([seed, N, levels or 0])
    draw = rng.normal if levels is None else lambda size: rng.integers(levels, size=size) * 0.7
    return draw(size=(P, N)), draw(size=(P, N))


def gaussian_pools(P, N, rho, seed):
    rng = np.random.default_rng(seed)
    proxy = rng.normal(size=(P, N))
    return proxy, rho * proxy + math.sqrt(1 - rho**2) * rng.normal(size=(P, N))


def assert_mean_is(samples, expected, num_se=4):
    """The mean over axis 0 is within num_se standard errors, and the test has power to say no."""
    se = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    assert np.all(se < 0.03)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - expected), num_se * se)


# --- best of n ---


@pytest.mark.parametrize("levels", [None, 2, 3], ids=["no-ties", "2-levels", "3-levels"])
@pytest.mark.parametrize("N", range(1, 8))
def test_equals_brute_force_over_all_subsets(N, levels):
    proxy, gold = pools(N, levels)
    expected = np.array([[brute_force(p, g, n) for n in range(1, N + 1)] for p, g in zip(proxy, gold, strict=True)])
    ns = np.arange(1, N + 1)
    np.testing.assert_allclose(best_of_n(proxy, gold, ns), expected[..., 0], **EXACT)
    np.testing.assert_allclose(win_rate(proxy, gold, ns[:-1]), expected[:, :-1, 1], **EXACT)


@pytest.mark.parametrize(("proxy_levels", "gold_levels"), [(None, 2), (2, None), (1, None)])
def test_equals_brute_force_with_ties_on_one_side(proxy_levels, gold_levels):
    N = 6
    proxy, gold = pools(N, proxy_levels)[0], pools(N, gold_levels, seed=1)[1]
    for n in range(1, N):
        expected = np.array([brute_force(p, g, n) for p, g in zip(proxy, gold, strict=True)])
        np.testing.assert_allclose(best_of_n(proxy, gold, n)[:, 0], expected[:, 0], **EXACT)
        np.testing.assert_allclose(win_rate(proxy, gold, n)[:, 0], expected[:, 1], **EXACT)


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1999, 2000])
def test_subset_weights_equal_exact_integers(n):
    N = 2000
    weights = subset_weights(N, n)
    exact = [math.comb(N - k - 1, n - 1) / math.comb(N, n) for k in range(N)]
    padded = np.pad(weights, (0, N - len(weights)))
    np.testing.assert_allclose(padded, exact, rtol=1e-10, atol=1e-16)
    assert abs(sum(weights) - 1) < 1e-12


def test_all_n_of_a_coste_pool_need_few_terms_and_keep_their_mass():
    N = 12_600
    lengths, mass = np.transpose([(w.size, w.sum()) for w in map(subset_weights, [N] * N, range(1, N + 1))])
    harmonic = sum(1 / n for n in range(1, N + 1))
    assert lengths.sum() <= N * (math.log(1e16) * harmonic + 1) < N**2 / 30
    np.testing.assert_allclose(mass, 1, rtol=0, atol=1e-11)


@pytest.mark.parametrize("levels", [None, 5])
def test_one_is_the_mean_and_all_is_the_value_at_the_top(levels):
    proxy, value = pools(300, levels)
    result = best_of_n(proxy, value, [1, 300])
    top = [v[p == p.max()].mean() for p, v in zip(proxy, value, strict=True)]
    np.testing.assert_allclose(result[:, 0], value.mean(axis=1), **EXACT)
    np.testing.assert_allclose(result[:, 1], top, **EXACT)


def test_gaussian_gain_is_rho_times_sigma_times_expected_maximum():
    rho, sigma, ns = 0.6, 2.5, [1, 2, 4, 16, 64]
    proxy, gold = gaussian_pools(P=1500, N=256, rho=rho, seed=3)
    x = np.linspace(-10, 10, 20_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in x])
    e_n = [np.sum(x * n * density * below ** (n - 1)) * (x[1] - x[0]) for n in ns]
    assert_mean_is(best_of_n(proxy, sigma * gold, ns), rho * sigma * np.array(e_n))
    assert_mean_is(best_of_n(proxy, proxy, ns), np.array(e_n))


@pytest.mark.parametrize("estimate", [best_of_n, win_rate])
@pytest.mark.parametrize("levels", [None, 4])
def test_order_of_samples_does_not_matter(estimate, levels):
    proxy, gold = pools(90, levels)
    shuffle = np.random.default_rng(5).permutation(90)
    ns = [1, 3, 40, 89]
    result = estimate(proxy, gold, ns)
    np.testing.assert_allclose(estimate(proxy[:, shuffle], gold[:, shuffle], ns), result, **EXACT)
    misjoined = estimate(proxy, gold[:, shuffle], ns)  # only one side shuffled: must show
    assert np.abs(misjoined - result)[:, 1:].max() > 0.01


@pytest.mark.parametrize("levels", [None, 4])
def test_proxy_of_the_selected_never_falls_in_n_while_gold_may(levels):
    proxy, _ = pools(200, levels)
    ns = np.arange(1, 201)
    assert np.all(np.diff(best_of_n(proxy, proxy, ns)) >= -1e-12)
    hacked = np.where(proxy >= np.quantile(proxy, 0.9), -proxy, proxy)
    assert np.diff(best_of_n(proxy, hacked, ns)).min() < -0.001


@pytest.mark.parametrize("levels", [None, 4])
def test_oracle_is_a_ceiling_reached_only_by_the_gold_order(levels):
    proxy, gold = pools(120, levels)
    ns = [1, 2, 8, 50, 120]
    ceiling = oracle(gold, ns)
    assert np.all(ceiling >= best_of_n(proxy, gold, ns) - 1e-12)
    assert np.all(ceiling[:, 1:] > best_of_n(-gold, gold, ns)[:, 1:] + 0.1)
    np.testing.assert_allclose(best_of_n(np.exp(gold), gold, ns), ceiling, **EXACT)


def test_pools_do_not_mix_and_scalar_n_is_one_column():
    proxy, gold = pools(30, 3)
    for estimate in (best_of_n, win_rate):
        together = estimate(proxy, gold, [2, 9])
        apart = np.concatenate([estimate(proxy[p : p + 1], gold[p : p + 1], [2, 9]) for p in range(4)])
        np.testing.assert_allclose(together, apart, **EXACT)
        np.testing.assert_array_equal(estimate(proxy, gold, 9), together[:, 1:])


# --- win rate ---


@pytest.mark.parametrize("N", [2, 3, 64, 65, 333])
def test_perfect_proxy_wins_exactly_n_over_n_plus_1(N):
    gold = pools(N, None)[1]
    ns = np.arange(1, N)
    np.testing.assert_allclose(win_rate(gold, gold, ns), np.tile(ns / (ns + 1), (4, 1)), **EXACT)
    np.testing.assert_allclose(win_rate(-gold, gold, ns), np.tile(1 / (ns + 1), (4, 1)), **EXACT)


@pytest.mark.parametrize("levels", [None, 5])
def test_win_rate_is_half_at_one_and_mirrors_with_gold(levels):
    proxy, gold = pools(301, levels)
    ns = [1, 2, 10, 150, 300]
    rate = win_rate(proxy, gold, ns)
    np.testing.assert_allclose(rate[:, 0], 0.5, **EXACT)
    np.testing.assert_allclose(rate + win_rate(proxy, -gold, ns), 1, **EXACT)
    np.testing.assert_allclose(win_rate(proxy, np.exp(gold), ns), rate, **EXACT)
    assert np.ptp(rate) > 0.05


def test_win_rate_equals_simulation_with_fresh_samples():
    n, rho, trials = 8, 0.6, 40_000
    proxy, gold = gaussian_pools(trials, n + 1, rho, seed=7)
    best = gold[np.arange(trials), proxy[:, :n].argmax(axis=1)]
    simulated = (best > gold[:, n]).astype(float)
    exact = win_rate(*gaussian_pools(1000, 128, rho, seed=8), n)
    assert_mean_is(simulated, exact.mean())
    assert exact.mean() > 0.6


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("N", [1, 2, 31, 32, 33])
def testcount_lower_in_both_equals_all_comparisons(N, levels):
    proxy, gold = (scores[0] for scores in pools(N, levels))
    expected = ((proxy < proxy[:, None]) & (gold < gold[:, None])).sum(axis=1)
    np.testing.assert_array_equal(count_lower_in_both(proxy, gold), expected)


@pytest.mark.slow
def test_tied_win_rate_is_the_mean_over_random_tie_breaks():
    proxy, gold = (scores[:1] for scores in pools(40, 4))
    rng = np.random.default_rng(11)
    broken = proxy + 0.01 * rng.random((4000, 40))
    ns = [2, 5, 20, 39]
    gold_repeated = np.repeat(gold, 4000, axis=0)
    assert_mean_is(win_rate(broken, gold_repeated, ns), win_rate(proxy, gold, ns)[0])
    assert_mean_is(best_of_n(broken, gold_repeated, ns), best_of_n(proxy, gold, ns)[0])


# --- KL ---


def brute_force_kl(masses, n):
    """KL of the best of n independent draws from `masses`, by listing all outcomes."""
    best = np.zeros(len(masses))
    for draw in itertools.product(range(len(masses)), repeat=n):
        best[max(draw)] += math.prod(masses[b] for b in draw)
    return sum(P * math.log(P / p) for P, p in zip(best, masses, strict=True) if P > 0)


def fine_grid_kl(masses, n):
    F = np.concatenate([[0], np.cumsum(masses)])
    P = np.diff(F**n)
    seen = P > 0  # low blocks underflow at large n
    return np.sum(P[seen] * np.log(P[seen] / masses[seen]))


@pytest.mark.parametrize("masses", [[1.0], [0.5, 0.5], [0.7, 0.1, 0.2], [0.2, 0.1, 0.7]])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_kl_discrete_equals_enumeration(masses, n):
    assert kl_discrete(masses, n) == pytest.approx(brute_force_kl(masses, n), abs=1e-12)


def test_kl_discrete_keeps_its_digits_at_extreme_masses():
    # Best of n is almost surely the top block: KL -> -log p_top, however small that mass is.
    assert kl_discrete([1 - 1e-12, 1e-12], 10**15) == pytest.approx(12 * math.log(10), rel=1e-9)
    # One draw in 1e12 sees the rare top block: P = n p to first order.
    n, p = 1000, 1e-12
    first_order = n * p * math.log(n) - n * p + p  # second term: the mass the low block loses
    assert kl_discrete([1 - p, p], n) == pytest.approx(first_order, rel=1e-3)
    # Blocks without mass change nothing.
    assert kl_discrete([0, 0.4, 0, 0.6, 0], 5) == pytest.approx(kl_discrete([0.4, 0.6], 5))


def test_kl_bound_values_from_gao_et_al():
    assert kl_bound(1) == 0
    np.testing.assert_allclose(kl_bound([1000, 60_000]), [5.91, 10.0], atol=0.005)
    assert kl_bound(np.array([[2, 4, 8]])).shape == (1, 3)


def test_kl_discrete_reaches_the_bound_on_a_fine_uniform_grid_only():
    ns = np.array([1, 2, 8, 128, 1024])
    fine = kl_discrete(np.full(10**6, 1e-6), ns)
    np.testing.assert_allclose(fine, kl_bound(ns), rtol=0, atol=1e-3)
    for num_blocks in (3, 50, 10**6):
        assert np.all(kl_discrete(np.full(num_blocks, 1 / num_blocks), ns) <= kl_bound(ns) + 1e-9)
    assert np.all(kl_discrete(np.full(50, 1 / 50), ns)[1:] < kl_bound(ns)[1:] - 1e-4)


@pytest.mark.parametrize("eps", [0.001, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_kl_with_atom_equals_a_fine_distribution_with_one_top_atom(n, eps):
    num_blocks = 200_000
    masses = np.append(np.full(num_blocks, (1 - eps) / num_blocks), eps)
    atom = kl_with_atom(n, eps)
    assert atom == pytest.approx(fine_grid_kl(masses, n), abs=1e-4)
    assert kl_discrete(masses, n) == pytest.approx(fine_grid_kl(masses, n), abs=1e-7)
    assert atom <= kl_bound(n) + 1e-12
    assert atom <= -math.log(eps) + 1e-12


def test_kl_with_atom_limits_table_and_broadcast():
    ns = np.array([1, 2, 128])
    np.testing.assert_allclose(kl_with_atom(ns, 0.0), kl_bound(ns), **EXACT)
    np.testing.assert_allclose(kl_with_atom(ns, 1e-14), kl_bound(ns), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(kl_with_atom(ns, 1.0), 0)
    table = kl_with_atom(128, [0, 0.01, 0.1, 0.5])
    np.testing.assert_allclose(table, [3.86, 3.81, 2.30, 0.69], atol=0.005)
    assert kl_with_atom(ns[:, None], [0.1, 0.2]).shape == (3, 2)


def test_kl_pool_is_the_discrete_kl_of_each_prompt():
    proxy = np.array([[3, 1, 2, 0], [5, 5, 5, 5], [1, 0, 0, 1], [0, 2, 0, 0]])
    masses = [[0.25] * 4, [1.0], [0.5, 0.5], [0.75, 0.25]]
    expected = [[brute_force_kl(m, n) for n in (1, 2, 4)] for m in masses]
    result = kl_pool(proxy, [1, 2, 4])
    np.testing.assert_allclose(result, expected, **EXACT)
    assert result[0, 2] < math.log(4)


# --- errors name the argument, its value and the remedy ---

POOL = np.arange(12.0).reshape(2, 6)
HOLED = np.where(np.isin(POOL, [3, 8]), math.nan, POOL)
RNG = np.random.default_rng(0)
FAULTS = {
    "n below 1": (lambda: best_of_n(POOL, POOL, [1, 0]), r"ns\[1\]=0 is below 1; .*at least one"),
    "n above N": (lambda: oracle(POOL, [7]), r"ns\[0\]=7 exceeds 6, .*per prompt; .*lower n"),
    "win n above N-1": (lambda: win_rate(POOL, POOL, 6), r"ns=6 exceeds 5, .*base.*; .*lower n"),
    "n fraction": (lambda: best_of_n(POOL, POOL, 2.5), r"ns=2.5 is not an integer; pass whole"),
    "n NaN": (lambda: kl_bound(math.nan), r"n=nan is not an integer; pass whole"),
    "n bool": (lambda: kl_bound([True]), r"n\[0\]=True is not an integer; pass whole"),
    "n text": (lambda: kl_bound("4"), r"n='4' is not an integer; pass whole"),
    "ns 2-D": (lambda: best_of_n(POOL, POOL, [[1]]), r"ns has shape \(1, 1\); pass one dimension"),
    "weights n": (lambda: subset_weights(5, 6), r"n=6 exceeds 5, .*lower n"),
    "weights N": (lambda: subset_weights(5.5, 2), r"N=5.5 is not an integer"),
    "kl n": (lambda: kl_discrete([1], -1), r"n=-1 is below 1"),
    "atom n": (lambda: kl_with_atom([1, 0.5], 0.1), r"n\[1\]=0.5 is not an integer"),
    "pool n": (lambda: kl_pool(POOL, 7), r"ns=7 exceeds 6"),
    "proxy NaN": (
        lambda: best_of_n(HOLED, POOL, 1),
        r"proxy holds 2 NaN .*first nan at index \(0, 3\); score again",
    ),
    "value NaN": (lambda: best_of_n(POOL, HOLED, 1), r"value holds 2 NaN .*index \(0, 3\)"),
    "gold NaN": (lambda: win_rate(POOL, HOLED, 1), r"gold holds 2 NaN .*index \(0, 3\)"),
    "gold inf": (
        lambda: win_rate(POOL, np.where(POOL == 4, -math.inf, POOL), 1),
        r"gold holds 1 .*-inf",
    ),
    "value shape": (
        lambda: best_of_n(POOL, POOL[:, :5], 1),
        r"value has shape \(2, 5\) but proxy has shape \(2, 6\); join both tables",
    ),
    "gold shape": (lambda: win_rate(POOL, POOL[:1], 1), r"gold has shape \(1, 6\) but proxy has"),
    "proxy 1-D": (lambda: kl_pool(POOL[0], 1), r"proxy has shape \(6,\); pass two dimensions"),
    "masses sum": (lambda: kl_discrete([0.5, 0.4], 2), r"block_prob.* sum 0.9; pass .*sum to 1"),
    "masses negative": (lambda: kl_discrete([1.5, -0.5], 2), r"block_prob.*; pass .*masses >= 0"),
    "masses NaN": (lambda: kl_discrete([math.nan], 2), r"block_probabilities .*sum nan; pass"),
    "eps": (lambda: kl_with_atom(2, 1.5), r"eps=1.5 is not a probability; pass .*between 0 and 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_error_names_argument_value_and_remedy(fault):
    call, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        call()
