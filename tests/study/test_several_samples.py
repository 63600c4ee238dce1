"""Policies that were evaluated with several samples a prompt (`eval.samples`): prompts are what intervals are over."""

import numpy as np
import pytest

from bon.gains import scale
from study.analysis.conditions import Plan
from study.analysis.policies import series_curves, series_findings
from tests.builders.planted import pools

PLAN = Plan(np.arange(1, 33), draws=400)
STEPS, P = (0, 4, 8), 40


def rows(samples: int, copies: int = 1) -> list[dict]:
    """Gold differs between prompts and, by as much, between samples; each sample stands there `copies` times."""
    rng = np.random.default_rng(1)
    of_prompt = rng.normal(size=(P, len(STEPS)))
    found = []
    for k in range(samples):
        own = rng.normal(size=(P, len(STEPS)))
        for p in range(P):
            for j, step in enumerate(STEPS):
                gold = of_prompt[p, j] + own[p, j] + 0.1 * step
                found += [
                    {"step": step, "prompt_id": f"p{p:03d}", "sample_id": k * copies + c, "proxy": step + own[p, j],
                     "gold": gold, "kl": 0.5 * step} for c in range(copies)
                ]  # fmt: skip
    np.random.default_rng(2).shuffle(found)
    return found


def test_samples_of_a_prompt_are_averaged_whatever_their_order():
    table = pools(P)
    given = rows(samples=4)
    curve = series_curves("it", given, PLAN, pools=table, proxy="bt-seed0")["gold"]
    assert curve.values.shape == (1, P, len(STEPS)) and curve.pool == 4
    for j, step in enumerate(STEPS):
        for i, prompt in enumerate(table.prompt_ids):
            mine = [r["gold"] for r in given if r["step"] == step and r["prompt_id"] == prompt]
            gained = (np.mean(mine) - table.gold[i].mean()) / scale(table.gold)
            assert curve.values[0, i, j] == pytest.approx(gained)


def test_copies_of_samples_make_no_interval_narrower_and_new_samples_do():
    once, copied, more = (
        series_findings(series_curves("it", given, PLAN, pools=pools(P), proxy="bt-seed0"))["gold"]
        for given in (rows(2), rows(2, copies=8), rows(16))
    )
    assert (copied.mean, copied.lo, copied.hi) == pytest.approx((once.mean, once.lo, once.hi))
    # Variance of a prompt's mean: 1 + 1/2 with two samples, 1 + 1/16 with sixteen.
    assert more.half_width / once.half_width == pytest.approx(np.sqrt((1 + 1 / 16) / (1 + 1 / 2)), rel=0.2)
