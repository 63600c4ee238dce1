"""Curves and KL of the evaluation: units, matching by id, intervals, and KL against brute force in float64."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bon.curves import COLUMNS, curve, matrix, read_curves, write_curves
from bon.run import analyse, within_prompt_correlation
from bon.scores import write_scores
from core.config import BestOfN, Config, Evaluation
from core.errors import ArtefactError
from core.files import join
from pipelines.evaluate import change
from pipelines.policy_kl import measure_kl
from pipelines.verdicts import cross_fitted_drop

TEMPERATURE = 0.7
P, N = 6, 4


def pool(rng) -> list[dict]:
    return [
        {"prompt_id": f"p{p}", "sample_id": s, "n_tokens": int(rng.integers(1, 9)), "response": f"{p} {s}"}
        for p in range(P)
        for s in range(N)
    ]


def test_matrix_is_placed_by_id_not_by_order():
    rows = [{**row, "x": 10 * p + s} for p in range(P) for s, row in enumerate(pool(np.random.default_rng(0))[:N])]
    rows = [{**row, "prompt_id": f"p{row['x'] // 10}"} for row in rows]
    expected = [[10 * p + s for s in range(N)] for p in range(P)]
    np.testing.assert_array_equal(matrix(rows, "x"), expected)
    np.testing.assert_array_equal(matrix(rows[::-1], "x"), expected)


@pytest.mark.parametrize("damage", [lambda r: r[:-1], lambda r: [*r, r[0]], lambda r: [*r[:-1], r[0]]])
def test_tables_that_do_not_match_by_id_are_errors(damage):
    rows = pool(np.random.default_rng(0))
    with pytest.raises(ValueError, match="ragged"):
        matrix(damage(rows), "n_tokens")
    with pytest.raises(ArtefactError, match="do not join"):
        join(rows, damage([{"prompt_id": r["prompt_id"], "sample_id": r["sample_id"], "score": 0.0} for r in rows]))


@pytest.fixture
def analysed(tmp_path):
    """Best-of-n of a proxy 3 gold + 5, its scores stored in another order than the samples."""
    rng = np.random.default_rng(1)
    samples, gold = pool(rng), rng.normal(7.0, 2.0, P * N)
    write_scores(tmp_path / "scores" / "gold.parquet", samples, gold.tolist())
    write_scores(tmp_path / "scores" / "rm.parquet", samples[::-1], (3 * gold + 5)[::-1].tolist())
    cfg = Config(bon=BestOfN(samples=N), eval=Evaluation(bootstrap=200))
    metrics = analyse(cfg, tmp_path, samples, {"rm": (5.0, 3.0)})
    return gold.reshape(P, N), metrics, read_curves(tmp_path / "curves.csv")


def test_best_of_n_curves_are_normalised_and_joined_by_id(analysed):
    gold, metrics, rows = analysed
    assert metrics["gold_mean"] == pytest.approx(gold.mean()) and metrics["gold_std"] == pytest.approx(gold.std(ddof=1))
    found = {(r["rm"], r["metric"], r["x"]): r["mean"] for r in rows}
    assert found["rm", "gold", 1] == pytest.approx(0, abs=1e-12)
    assert found["rm", "proxy", N] == pytest.approx(gold.max(axis=1).mean())  # (3 gold + 5 - 5) / 3
    unit = (gold.max(axis=1).mean() - gold.mean()) / gold.std(ddof=1)
    assert found["rm", "gold", N] == pytest.approx(unit) == found["oracle", "gold", N]
    assert metrics["variants"]["rm"]["within_prompt_correlation"] == pytest.approx(1)


def test_best_of_n_rows_carry_the_bound_and_their_size(analysed):
    for row in analysed[2]:
        assert set(row) == set(COLUMNS) and row["method"] == "bon" and row["kl_kind"] == "bound"
        assert row["kl"] == pytest.approx(math.log(row["x"]) - (row["x"] - 1) / row["x"])
        assert row["d"] == pytest.approx(math.sqrt(row["kl"]))
        assert row["lo"] <= row["mean"] <= row["hi"] and (row["prompts"], row["pool"]) == (P, N)


def test_ppo_rows_survive_the_file(tmp_path):
    values = np.random.default_rng(2).normal(size=(P, 3))
    rows = curve(
        values, rm="rm", method="ppo", metric="gold", xs=[0, 5, 10], kl=[-1e-9, 0.5, 2.0], kl_kind="rb", pool=1,
        draws=200, seed=3,
    )  # fmt: skip
    write_curves(tmp_path / "curves.csv", rows)
    assert read_curves(tmp_path / "curves.csv") == rows
    assert [r["x"] for r in rows] == [0, 5, 10] and rows[0]["d"] == 0 and rows[2]["d"] == math.sqrt(2)
    np.testing.assert_allclose([r["mean"] for r in rows], values.mean(axis=0))


def test_change_is_paired():
    rng = np.random.default_rng(4)
    first = rng.normal(0, 100, size=50)  # far between prompts, which pairing takes out
    found = change(first, first + 0.5 + rng.normal(0, 0.01, 50), draws=500, seed=0)
    assert 0.49 < found["lo"] < found["mean"] < found["hi"] < 0.51 and found["se"] < 0.01


def test_drop_from_the_best_is_not_found_in_noise_but_in_a_fall():
    rng = np.random.default_rng(5)
    drops = [cross_fitted_drop(rng.normal(size=(60, 8)), draws=100, seed=s)["mean"] for s in range(200)]
    assert abs(np.mean(drops)) < 4 * np.std(drops) / math.sqrt(len(drops))
    fall = rng.normal(0, 0.1, size=(60, 3)) + np.array([0.0, 1.0, 0.4])
    found = cross_fitted_drop(fall, draws=200, seed=0)
    assert found["lo"] > 0.5 and found["mean"] == pytest.approx(0.6, abs=0.1)


def test_within_prompt_correlation_ignores_prompt_means():
    within = np.tile([-1.0, 0.0, 1.0], (4, 1))
    shift = np.arange(4.0)[:, None]
    assert within_prompt_correlation(within + 100 * shift, -within + 100 * shift) == pytest.approx(-1)
    assert within_prompt_correlation(within, np.ones_like(within)) is None


class IdTokenizer:
    """A prompt is its token ids."""

    pad_id = 0

    def prompt_ids(self, prompt):
        return prompt


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def next_token_logps(lm, prompt: list[int], response: list[int]) -> np.ndarray:
    """float64 [T, V] where each response token is predicted, one sequence alone, without padding."""
    logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().numpy() / TEMPERATURE
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [3, 512])
def test_kl_per_response_equals_brute_force(chunk, monkeypatch):
    monkeypatch.setattr("pipelines.policy_kl.LOGIT_ROWS", chunk)
    policy, reference = tiny_llama(0), tiny_llama(1)
    rng = np.random.default_rng(6)
    sizes = [(3, 7), (9, 1), (1, 5), (4, 4), (6, 8)]
    samples = [
        {"prompt": rng.integers(1, 64, p).tolist(), "token_ids": rng.integers(1, 64, r).tolist()} for p, r in sizes
    ]
    found = measure_kl(policy, reference, IdTokenizer(), samples, TEMPERATURE, micro=2)
    for sample, kl in zip(samples, found, strict=True):
        prompt, response = sample["prompt"], sample["token_ids"]
        logp, ref = (next_token_logps(lm, prompt, response) for lm in (policy, reference))
        at = np.arange(len(response)), response
        ratio = ref[at] - logp[at]
        assert kl["kl_rb"] == pytest.approx((np.exp(logp) * (logp - ref)).sum(), rel=1e-4)
        assert kl["logp"] == pytest.approx(logp[at].sum(), rel=1e-4)
        assert kl["kl_k1"] == pytest.approx((logp[at] - ref[at]).sum(), rel=1e-4, abs=1e-4)
        assert kl["kl_k3"] == pytest.approx((np.exp(ratio) - 1 - ratio).sum(), rel=1e-4)
    same = measure_kl(policy, policy, IdTokenizer(), samples, TEMPERATURE, micro=2)
    assert all(abs(kl[k]) < 1e-5 for kl in same for k in ("kl_k1", "kl_k3", "kl_rb"))
