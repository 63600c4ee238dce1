"""What stage `eval` says of its samples, in the unit of the report."""

import numpy as np
import pytest

from bon.gains import scale
from bon.pools import Pools
from pipelines.evaluate import summary

P = 40


def rows(rng, rise):
    base = rng.normal(0, 100, size=P)  # prompts differ far more than steps do
    return [
        {"step": step, "prompt_id": f"p{p}", "proxy": base[p] + step * rise, "gold": -base[p] - 2.0 * step * rise,
         "kl_rb": 0.5 * step, "n_tokens": 10 + step, "finished": step > 0}
        for step in (0, 4) for p in range(P)
    ]  # fmt: skip


def test_the_change_is_paired_and_in_sd_within_prompts():
    rng = np.random.default_rng(0)
    gold, proxy = rng.normal(0, 4, size=(20, 16)), rng.normal(0, 0.5, size=(20, 16))
    pools = Pools(tuple(f"q{i}" for i in range(20)), gold, {"rm": proxy})
    found = summary(rows(rng, rise=0.25), pools, proxy)
    assert found["proxy_change"] == pytest.approx(1.0 / scale(proxy))
    assert found["gold_change"] == pytest.approx(-2.0 / scale(gold))
    assert "SE 0.00" in found["headline"] and "KL 2.00 nats" in found["headline"] and "40 prompts" in found["headline"]
    assert [row["eos_rate"] for row in found["table"]] == [0.0, 1.0] and found["table"][1]["tokens"] == 14


def test_several_samples_of_a_prompt_count_as_one_prompt():
    """The standard error is over prompts: four times the same samples know no more."""
    rng = np.random.default_rng(1)
    pools = Pools(tuple(f"q{i}" for i in range(20)), rng.normal(size=(20, 16)), {"rm": rng.normal(size=(20, 16))})
    once = [row | {"gold": row["gold"] + rng.normal()} for row in rows(rng, rise=0.25)]
    found = [summary(given, pools, pools.proxies["rm"]) for given in (once, 4 * once)]
    assert found[0]["headline"] == found[1]["headline"] and found[0]["gold_change"] == pytest.approx(
        found[1]["gold_change"]
    )
