"""Both sides of the PPO row on a tiny model: they train as many weights, and the reward of the first rollout agrees."""

from pathlib import Path

import pytest

from benchmarks import agreement, tasks
from benchmarks.environments import TRL_PPO
from benchmarks.rows import rows
from benchmarks.workers import Worker
from tests.builders.policies import SIZES, tiny_policy

RANK = 4


@pytest.fixture(scope="module")
def task(tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    policy = tiny_policy("llama", tokenizer_path, folder / "policy")
    return tasks.ppo(2, [
        f"policy.path={policy}", f"rm.base.path={policy}", "ppo.rollouts=32", "ppo.micro_batch=4", "ppo.minibatches=4",
        "generation.max_new_tokens=8", f"ppo.lora.rank={RANK}", "ppo.lora.top_layers=1",
        "ppo.critic_trainable_layers=1",
    ], folder / "work")  # fmt: skip


def trained_by_hand():
    """Adapters on the seven linear maps of the top layer, and that layer, the last norm and the head of the critic."""
    hidden, inner, heads = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"]
    narrow = hidden // heads * 2  # two key and value heads
    maps = [(hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden)] + 3 * [(hidden, inner)]
    layer = sum(a * b for a, b in maps) + 2 * hidden
    return {"actor": sum(RANK * (a + b) for a, b in maps), "critic": layer + hidden + hidden}


def finished(program, job, log: Path) -> dict:
    with Worker(program, job, log) as worker:
        assert [worker.run()[1] for _ in range(2)] == [32, 32]
        return worker.check()


@pytest.mark.long
def test_ours_takes_turns_on_all_ranks(task, tmp_path):
    found = finished(rows()["ppo"].ours, task.ours, tmp_path / "ours.log")
    assert found["trained"] == trained_by_hand()
    assert len(found["tokens"]) == 2 and all(0 < tokens <= 32 * 8 for tokens in found["tokens"])
    if not Path(TRL_PPO.python).is_file():
        pytest.skip("no environment of TRL 0.24: `make bench PEERS=1` makes it")
    theirs = finished(rows()["ppo"].theirs, task.theirs, tmp_path / "theirs.log")
    assert all(check["ok"] for check in agreement.ppo_training(found, theirs)), (found, theirs)
