"""What stage `eval` says of its samples, in the unit of the report."""

import numpy as np
import pytest

from bon.gains import scale
from bon.pools import Pools
from pipelines.evaluate import AVERAGE, policies_of, summary, with_average

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


def test_the_average_of_the_weights_is_one_of_the_policies(tmp_path):
    for name in ("step-0004", "step-0010", "step-0008"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = policies_of(tmp_path)
    assert list(found) == [0, 4, 8, 10] and found[0] is None and found[4] == tmp_path / "checkpoints" / "step-0004"
    (tmp_path / "policy-ema").mkdir()
    assert policies_of(tmp_path) == found | {AVERAGE: tmp_path / "policy-ema"}


def test_the_average_is_compared_with_the_reference():
    rng = np.random.default_rng(2)
    pools = Pools(tuple(f"q{i}" for i in range(20)), rng.normal(size=(20, 16)), {"rm": rng.normal(size=(20, 16))})
    steps = [row | {"reward_function": row["step"] / 8} for row in rows(rng, rise=0.25)]
    average = [row | {"proxy": row["proxy"] + 3.0, "reward_function": 1.0} for row in steps if row["step"] == 4]
    proxy = pools.proxies["rm"]
    metrics = summary(steps, pools, proxy)
    of_average = summary([row for row in steps if row["step"] == 0] + average, pools, proxy)
    found = metrics | with_average(metrics, of_average)
    assert found["average"]["proxy_change"] == pytest.approx(metrics["proxy_change"] + 3.0 / scale(proxy))
    assert found["average"]["gold_change"] == pytest.approx(metrics["gold_change"])
    assert [row["reward_function"] for row in found["table"]] == [0.0, 0.5]
    assert found["average"]["reward_function"] == 1.0 and found["average"]["step"] == 4
    assert found["headline"].startswith(metrics["headline"] + "; policy-ema: proxy +")
