"""A run of PPO with the example of docs/own-reward.md, and evaluations on held-out prompts: what it leaves is true."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.data.rows import RolloutRow
from core.files import read_rows, read_table
from examples.exact_answer import is_right, reward
from ppo.log import summary
from ppo.measured.rollouts import tables
from tests.builders.processes import run_program

GOLD = "gold_mean_not_used_for_training"


def test_the_last_number_counts():
    for response in ("7", "3 plus 4 is 7.", "It is 7.0!", "1,007 - 1,000 = 7"):
        assert is_right(response, 7) and is_right(response, "7"), response
    for response in ("", "seven", "7, or 8?", "77", "-7"):
        assert not is_right(response, 7), response
    assert is_right("That leaves -2", -2) and is_right("1,000", 1000)
    prompt = [{"role": "user", "content": "What is 3 plus 4?"}]
    assert reward([prompt] * 2, ["7", "8"], [{"answer": 7}] * 2) == [1.0, 0.0]


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory):
    """The folder of a run whose policy answers with one digit or another at first."""
    folder = tmp_path_factory.mktemp("exact")
    run_program("tests/programs/ppo_exact_answer.py", tokenizer_path, folder, ranks=1)
    return folder


@pytest.mark.slow
def test_ppo_raises_the_reward(run):
    """The policy learns the answers from this reward alone."""
    rows = read_rows(run / "ppo" / "metrics.jsonl")
    right = [row["reward_function_mean"] for row in rows]
    assert right == [row["proxy_mean"] for row in rows] and right == pytest.approx([r["reward_mean"] for r in rows])
    # Nearly one digit in ten at first. The standard error of such a share of 128 responses is below 0.05.
    assert right[0] < 0.25 and min(right[-3:]) > 0.4
    kept = tables(run / "ppo" / "rollouts")
    assert list(kept) == [row["step"] for row in rows]
    for step, file in kept.items():
        found = read_table(file, RolloutRow)
        for row in found:
            a, b = (int(word.strip("?")) for word in row["prompt"][-1]["content"].split() if word.strip("?").isdigit())
            assert row["proxy"] == row["reward"] == row["reward_function"] == is_right(row["response"], a + b)
        kl = sum(sum(row["logprobs"]) - sum(row["ref_logprobs"]) for row in found) / len(found)
        assert kl == pytest.approx(rows[step - 1]["kl_nats_per_response"], abs=1e-5)


@pytest.mark.slow
def test_held_out_prompts_are_measured_as_by_transformers(run):
    """Row by row, with the policy as it was saved, its answers as vLLM gave them, and gold of its own."""
    rows = read_rows(run / "ppo" / "held_out.jsonl")
    measured = json.loads((run / "found.json").read_text())["measured"]
    assert [row["step"] for row in rows] == [0, 4, 8, 12, 16]
    assert {k: rows[-1][k] for k in measured} == pytest.approx(measured, abs=1e-4)
    assert rows[0]["kl_nats_per_response"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl_nats_per_response"] > 0.1
    assert summary(run / "ppo" / "metrics.jsonl")["held_out"] == {"first": rows[0], "last": rows[-1]}


@pytest.mark.slow
def test_gold_is_marked_wherever_it_is_shown(run):
    """And training's own metrics have none of it."""
    events = EventAccumulator(str(run / "ppo" / "tensorboard")).Reload()
    shown = sorted(tag for tag in events.Tags()["scalars"] if "gold" in tag)
    assert shown == [f"held_out/{GOLD}", "held_out/gold_se_not_used_for_training"]
    rows = read_rows(run / "ppo" / "held_out.jsonl")
    values = {event.step: event.value for event in events.Scalars(f"held_out/{GOLD}")}
    assert values == pytest.approx({row["step"]: row[GOLD] for row in rows})
    assert not [key for row in read_rows(run / "ppo" / "metrics.jsonl") for key in row if "gold" in key]


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_numbers_again(run):
    """Of rollouts and of evaluations, to the last bit."""
    found = json.loads((run / "found.json").read_text())
    assert found["again"] == 7 and found["before"] == found["after"]
    assert [row["step"] for row in found["before"]["held_out"]] == [8] and len(found["before"]["metrics"]) == 3
