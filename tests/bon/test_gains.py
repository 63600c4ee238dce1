"""The unit of over-optimisation, and what stage `bon` says in it."""

import numpy as np
import pytest

from bon.gains import correlation, gains, scale
from bon.run import summary
from bon.scores import optimised_rewards, read_pools, write_scores
from core.config import BestOfN
from core.errors import ArtefactError
from core.files import join, write_json, write_table

P, N = 6, 4


def pool(rng) -> list[dict]:
    return [
        {"prompt_id": f"p{p}", "sample_id": s, "n_tokens": int(rng.integers(1, 9)), "response": f"{p} {s}"}
        for p in range(P)
        for s in range(N)
    ]


def test_gains_have_mean_zero_and_unit_spread_within_prompts():
    values = np.random.default_rng(0).normal(5, 3, size=(50, 8)) + 100 * np.arange(50)[:, None]
    gain = gains(values)
    np.testing.assert_allclose(gain.mean(axis=1), 0, atol=1e-9)
    within = np.mean([np.var(row, ddof=1) for row in gain])  # prompts of one size: the pooled variance is the mean
    assert within == pytest.approx(1) and scale(values) == pytest.approx(3, rel=0.1)
    np.testing.assert_allclose(gains(7 * values - 2), gain, atol=1e-9)
    with pytest.raises(ValueError, match="do not vary within any prompt"):
        gains(np.ones((3, 4)) * np.arange(3)[:, None])


def test_correlation_ignores_prompt_means():
    within = np.tile([-1.0, 0.0, 1.0], (4, 1))
    shift = np.arange(4.0)[:, None]
    assert correlation(within + 100 * shift, -within + 100 * shift) == pytest.approx(-1)
    assert correlation(within, np.ones_like(within)) is None


@pytest.mark.parametrize("damage", [lambda r: r[:-1], lambda r: [*r, r[0]], lambda r: [*r[:-1], r[0]]])
def test_tables_that_do_not_match_by_id_are_errors(damage):
    rows = pool(np.random.default_rng(0))
    with pytest.raises(ArtefactError, match="do not join"):
        join(rows, damage([{"prompt_id": r["prompt_id"], "sample_id": r["sample_id"], "score": 0.0} for r in rows]))


@pytest.fixture
def folder(tmp_path):
    """Pools with gold and a proxy 3 gold + noise, whose scores are stored in another order than the samples."""
    rng = np.random.default_rng(1)
    samples, gold = pool(rng), rng.normal(7.0, 2.0, P * N)
    write_table(tmp_path / "samples.parquet", samples)
    write_scores(tmp_path / "scores" / "gold.parquet", samples, gold.tolist())
    write_scores(tmp_path / "scores" / "rm.parquet", samples[::-1], (3 * gold + 5)[::-1].tolist())
    return tmp_path, samples, gold.reshape(P, N)


def test_pools_whose_gold_does_not_vary_do_not_stop_the_stage(folder):
    out, samples, gold = folder
    write_scores(out / "scores" / "gold.parquet", samples, gold.mean(axis=1).repeat(N).round().tolist())
    assert "gold does not vary within any of 6 prompts" in summary(BestOfN(samples=N), out, samples, ["rm"])["headline"]


def test_the_headline_is_in_the_unit_and_joined_by_id(folder):
    out, samples, gold = folder
    metrics = summary(BestOfN(samples=N), out, samples, ["rm"])
    best = ((gold.max(axis=1) - gold.mean(axis=1)) / scale(gold)).mean()
    assert metrics["variants"]["rm"]["gold_at_n_max"] == pytest.approx(best) == metrics["oracle_at_n_max"]
    assert metrics["variants"]["rm"]["within_prompt_correlation"] == pytest.approx(1)
    assert f"rm {best:+.2f}" in metrics["headline"] and "best of 4 on 6 prompts" in metrics["headline"]


def test_an_ensemble_is_combined_on_the_pools_as_it_was_in_ppo(folder):
    out, samples, gold = folder
    write_scores(out / "scores" / "other.parquet", samples, (-gold).ravel().tolist())
    pools = read_pools(out, ["rm", "other"])
    for name, mean, std in (("rm", 26.0, 6.0), ("other", -7.0, 2.0)):
        (out / name).mkdir()
        write_json(
            out / name / "reward_model.json", {"format": 1, "head": "mlp", "tokenizer": "0", "mean": mean, "std": std}
        )
    combined = optimised_rewards(out, pools, ["rm", "other"], "min")
    np.testing.assert_allclose(combined, np.minimum((3 * gold + 5 - 26) / 6, (-gold + 7) / 2))
    np.testing.assert_allclose(optimised_rewards(out, pools, ["rm"], None), 3 * gold + 5)
