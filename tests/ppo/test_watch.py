"""The warnings of a run."""

import pytest

from ppo.measured.watch import CHECKS, warnings_of

HEALTHY = {
    "kl_nats_per_response": 1.0, "clipfrac": 0.02, "approx_kl": 0.003, "explained_variance": 0.3, "value_loss": 0.5,
    "eos_rate": 0.8, "response_tokens": 40.0, "mismatch_mean_abs": 0.04, "proxy_se": 0.03, "proxy_mean": 0.0,
    "sync_survival": 1.0, "sync_slope": 1.0,
}  # fmt: skip
SICK = {
    "kl negative": {"kl_nats_per_response": -2.0},
    "kl exploding": {"kl_nats_per_response": 30.0},
    "clipfrac": {"clipfrac": 0.5},
    "approx kl": {"approx_kl": 0.4},
    "critic": {"explained_variance": -1.4},
    "value loss": {"value_loss": 5.0},
    "eos": {"eos_rate": 0.1},
    "length": {"response_tokens": 100.0},
    "mismatch": {"mismatch_mean_abs": 0.3},
    "merging": {"sync_survival": 0.1, "sync_slope": 0.2},
    "reward variance": {"proxy_se": 0.001},
    "proxy falling": {"proxy_mean": -0.5},
}


def test_a_healthy_run_has_no_warnings():
    rising = [HEALTHY | {"proxy_mean": 0.05 * i, "kl_nats_per_response": 0.3 * i} for i in range(12)]
    assert all(warnings_of(rising[:n]) == [] for n in range(1, 13))


@pytest.mark.parametrize("name", SICK)
def test_each_warning_is_given_once(name):
    assert SICK.keys() == CHECKS.keys()
    rows = [HEALTHY] * 5 + [HEALTHY | SICK[name]] * 4
    given = [text for n in range(1, len(rows) + 1) for text in warnings_of(rows[:n])]
    assert given == [CHECKS[name][1]]


def test_a_mismatch_that_comes_with_staleness_is_none():
    """With ppo.overlap=4 the sampler falls behind step by step; from then on its distance may not double again."""
    ages = [0, 1, 2, 3, 4, 4, 4, 4]
    rows = [HEALTHY | {"staleness_max": float(age), "mismatch_mean_abs": 0.04 + 0.05 * age} for age in ages]
    assert all(warnings_of(rows[:n]) == [] for n in range(1, len(rows) + 1))
    worse = [*rows, HEALTHY | {"staleness_max": 4.0, "mismatch_mean_abs": 0.6}]
    assert warnings_of(worse) == [CHECKS["mismatch"][1]]
    unaware = [{k: v for k, v in row.items() if k != "staleness_max"} for row in rows]
    assert any(warnings_of(unaware[:n]) for n in range(1, len(rows) + 1)), "the test must be one of staleness"
