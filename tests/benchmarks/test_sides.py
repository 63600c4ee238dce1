"""The two sides of a row do the same work: in float32, on a tiny model, their results are equal within rounding."""

import random

import numpy as np
import pytest

from benchmarks import agreement, inputs
from benchmarks.workers import Program, Worker
from tests.builders.policies import tiny_policy

LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def policy(tokenizer_path, tmp_path_factory):
    return tiny_policy("llama", tokenizer_path, tmp_path_factory.mktemp("bench") / "policy")


@pytest.fixture(scope="module")
def chat(policy):
    return inputs.tokenizer(str(policy))


@pytest.fixture(scope="module")
def pairs(chat):
    draw = random.Random(0)
    return [inputs.random_pair(draw, chat, *(draw.randint(3, most) for most in (40, 20, 20))) for _ in range(24)]


def results(ours, theirs, job, logs, runs=1):
    """What both sides found after some runs, and the work that each counted."""
    found, work = [], []
    for name, script in (("ours", ours), ("theirs", theirs)):
        with Worker(Program(script), job, logs / f"{name}.log") as worker:
            work.append([worker.run()[1] for _ in range(runs)])
            found.append(worker.check())
    return found, work


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.long)])
def test_training_has_the_losses_of_trl(policy, chat, pairs, lora, tmp_path):
    job = {
        "model": str(policy), "dtype": "float32", "attention": "eager", "batch": 4, "steps_per_run": 2, "lora": lora,
        "batches": [pairs[i : i + 4] for i in range(0, 24, 4)], "lr": 1e-3, "head": inputs.head(128),
        "pad_id": chat.pad_id, "variant": {"head": "linear"},
    }  # fmt: skip
    (ours, theirs), work = results(
        "benchmarks.ours.reward_training", "benchmarks/peers/trl_reward.py", job, tmp_path, runs=2
    )
    assert work == [[8, 8], [8, 8]] and len(ours["losses"]) == 4
    # Adapters start at random, so with them only the first loss is of equal weights.
    compared = 1 if lora else 3
    assert ours["losses"][:compared] == pytest.approx(theirs["losses"][:compared], abs=2e-3)
    assert ours["losses"][0] != pytest.approx(ours["losses"][1], abs=1e-3)  # batches differ, so equality says something
    if not lora:
        assert all(check["ok"] for check in agreement.training_losses(ours, theirs))


@pytest.mark.slow
def test_scoring_has_the_rewards_of_a_classifier(policy, pairs, tmp_path):
    reward_model, classifier = inputs.reward_model(tmp_path / "models", str(policy))
    pool = inputs.response_pool(pairs, prompts=3, responses=7)
    job = {
        "reward_model": str(reward_model), "classifier": str(classifier), "dtype": "float32", "attention": "eager",
        "pool": pool, "batch": 4,
    }  # fmt: skip
    (ours, theirs), work = results("benchmarks.ours.scoring", "benchmarks/peers/transformers_score.py", job, tmp_path)
    assert ours["rewards"] == pytest.approx(theirs["rewards"], abs=1e-4)
    assert len(set(theirs["rewards"])) > 15 and all(check["ok"] for check in agreement.rewards(ours, theirs))
    tokens = sum(len(group["prompt"]) + len(response) for group in pool for response in group["responses"])
    assert work == [[tokens], [tokens]]


@pytest.mark.slow
def test_sampling_has_the_tokens_of_generate(policy, chat, tmp_path):
    chats = inputs.prompts(chat, 6)
    job = {
        "model": str(policy), "dtype": "float32", "attention": "eager", "n": 2, "max_new_tokens": 8,
        "prompts": [chat.prompt_ids(chat_) for chat_ in chats], "max_model_len": 256, "stop_ids": chat.stop_ids,
        "pad_id": chat.pad_id, "generation": {"temperature": 1.0}, "greedy": 5, "compared": 6,
    }  # fmt: skip
    (ours, theirs), work = results(
        "benchmarks.ours.sampling", "benchmarks/peers/transformers_generate.py", job, tmp_path
    )
    assert ours["greedy"] == theirs["greedy"] and [len(tokens) for tokens in ours["greedy"]] == [5] * 6
    assert all(12 <= count <= 6 * 2 * 8 for (count,) in work)


def test_best_of_n_has_the_estimates_of_pandas(tmp_path):
    pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(200, 12))
    np.save(tmp_path / "scores.npy", np.stack([gold + rng.normal(size=gold.shape), gold]))
    job = {"scores": str(tmp_path / "scores.npy"), "ns": [1, 4, 12]}
    (ours, theirs), work = results("benchmarks.ours.best_of_n", "benchmarks/peers/pandas_best_of_n.py", job, tmp_path)
    proxy, gold = np.load(tmp_path / "scores.npy")
    assert theirs["mean"][1] == pytest.approx(np.mean([g[p[:4].argmax()] for p, g in zip(proxy, gold, strict=True)]))
    assert ours["mean"][0] == pytest.approx(gold.mean()) and work == [[12], [3]]
    assert all(check["ok"] for check in agreement.best_of_n(ours, theirs))


def test_results_that_differ_are_noticed():
    losses = lambda *values: {"losses": list(values)}  # noqa: E731
    assert not agreement.training_losses(losses(0.7, 0.6), losses(0.8, 0.6))[0]["ok"]
    assert not agreement.training_losses(losses(0.7, 0.6), losses(0.7, 0.3))[1]["ok"]
    assert not agreement.finite_losses(losses(float("nan")), losses(0.7))[0]["ok"]
    assert not agreement.rewards({"rewards": [0.0, 1.0, 2.0]}, {"rewards": [0.5, 1.5, 2.5]})[0]["ok"]
    greedy = lambda *texts: {"greedy": [list(text) for text in texts]}  # noqa: E731
    assert agreement.greedy_tokens(greedy("abcd", "abcd"), greedy("abcd", "abxx"))[0]["ok"]
    assert not agreement.greedy_tokens(greedy("abcd", "abcd"), greedy("xbcd", "yxxx"))[0]["ok"]
    trained = {"actor": 10, "critic": 20}
    ours = {"trained": trained, "reward": 0.5, "reward_se": 0.1}
    assert all(check["ok"] for check in agreement.ppo_training(ours, {"trained": trained, "reward": 0.9}))
    assert not agreement.ppo_training(ours, {"trained": trained, "reward": 1.1})[1]["ok"]
    assert not agreement.ppo_training(ours, {"trained": trained | {"critic": 21}, "reward": 0.5})[0]["ok"]
    best = {"mean": [0.1, 0.5], "standard_error": [0.01, 0.01]}
    assert not agreement.best_of_n({"mean": [0.1, 0.51]}, best)[0]["ok"]
    assert not agreement.best_of_n({"mean": [0.2, 0.5]}, best)[1]["ok"]


def test_natural_lengths_are_those_of_the_data(monkeypatch, chat, tmp_path):
    """Without the data, random tokens: as long as real pairs, the same each time, ending with the end of turn."""
    monkeypatch.setenv("RLHF_DATA", str(tmp_path))
    found = inputs.natural_pairs(chat, 128)
    assert found == inputs.natural_pairs(chat, 128) and "random tokens" in found.origin
    mean = [np.mean([len(pair[side]) for pair in found.pairs]) for side in ("prompt", "chosen", "rejected")]
    assert mean == pytest.approx([149, 41, 51], rel=0.05)
    ends = {pair[side][-1] for pair in found.pairs for side in ("chosen", "rejected")}
    assert ends == {chat.eot_id}
    assert all(chat.eot_id not in pair["prompt"] for pair in found.pairs)
