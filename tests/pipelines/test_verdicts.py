"""Whether a run over-optimised: from the fall of gold after its best checkpoint."""

import math

import numpy as np
import pytest

from pipelines.verdicts import cross_fitted_drop, verdicts


def test_verdicts_say_what_the_intervals_allow():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 4))
    table = [{"step": 3, "kl": 2.0, "prompts": 400}]
    up, none = ({"mean": m, "lo": m - 0.1, "hi": m + 0.1} for m in (0.5, 0.05))
    said = verdicts(table, up, none, noise, [0, 1, 2, 3], 200, 1)
    assert "Proxy reward rose by 0.50" in said[0] and said[1].startswith("Gold: cannot tell")
    assert "cannot tell" in verdicts(table, none, up, noise, [0, 1, 2, 3], 200, 1)[0]
    assert said[2].startswith("No over-optimisation shown")
    falls = noise + np.array([0.0, 1.0, 0.5, 0.0])
    assert verdicts(table, up, up, falls, [0, 1, 2, 3], 200, 1)[2].startswith("Over-optimised")
    assert cross_fitted_drop(falls, 200, 1)["mean"] == pytest.approx(1.0, abs=0.2)


def test_drop_from_the_best_is_not_found_in_noise_but_in_a_fall():
    rng = np.random.default_rng(5)
    drops = [cross_fitted_drop(rng.normal(size=(60, 8)), draws=100, seed=s)["mean"] for s in range(200)]
    assert abs(np.mean(drops)) < 4 * np.std(drops) / math.sqrt(len(drops))
    fall = rng.normal(0, 0.1, size=(60, 3)) + np.array([0.0, 1.0, 0.4])
    found = cross_fitted_drop(fall, draws=200, seed=0)
    assert found["lo"] > 0.5 and found["mean"] == pytest.approx(0.6, abs=0.1)
