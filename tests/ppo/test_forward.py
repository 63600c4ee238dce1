"""The fast path of a PPO step equals the slow one: shared frozen layers, wide passes, frozen models on every rank."""

import json
from pathlib import Path

import pytest
import torch

from core.config import Model
from core.generation.local import Completion
from core.models.layers import FrozenLayers
from core.models.loading import load_causal_lm
from ppo.forward import Forward
from ppo.proxy import LocalProxy
from ppo.records import make_minibatches
from rm.model import RewardModel
from tests.builders.checkpoints import CHATS
from tests.builders.plain_engine import PlainEngine
from tests.builders.processes import run_program
from tests.builders.reward_models import tiny_reward_model
from tests.programs.ppo_stages import LAYERS, LAYOUTS, OF_TOKENS

ROUNDING = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def folder(tokenizer_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stages")
    run_program("tests/programs/ppo_stages.py", tokenizer_path, out, ranks=2)
    return out


@pytest.fixture(scope="module")
def found(folder) -> dict:
    runs = json.loads((folder / "found.json").read_text())
    for run in runs.values():
        run["rows"].sort(key=lambda row: (row["step"], row["ids"]))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "slow"])
def test_stages_and_shared_layers_give_the_same_step(found, layout):
    """Log-probs, values and rewards before the updates and after them, losses, and the weights that come out."""
    slow, fast = found["slow"], found[layout]
    assert (slow["shared"], fast["shared"]) == (False, True)
    # Each continues where its own frozen layers end: adapters on two layers, and a critic that trains one.
    assert (slow["depths"], fast["depths"]) == ([0, 0], [LAYERS - 2, LAYERS - 1])
    for one, other in zip(slow["rows"], fast["rows"], strict=True):
        assert one["ids"] == other["ids"]
        for name in (*OF_TOKENS, "proxy"):
            torch.testing.assert_close(torch.tensor(other[name]), torch.tensor(one[name]), **ROUNDING)
    for one, other in zip(slow["metrics"], fast["metrics"], strict=True):
        for name in ("policy_loss", "value_loss", "reward_mean", "approx_kl"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
    assert fast["weights"] == pytest.approx(slow["weights"], rel=1e-5)


@pytest.mark.slow
def test_models_that_are_read_into_shards_take_the_same_steps_to_the_bit(found):
    """As models that each rank reads whole before they are sharded."""
    assert found["sharded"] == found["read whole"]


@pytest.mark.slow
def test_the_shared_states_are_those_of_each_models_own_full_pass(found, folder):
    """Models of transformers, each on a row alone. The reward model `all` continues nothing, `top` does."""
    policy = Model(path=str(folder / "policy"), attention="eager")
    lm = load_causal_lm(policy, dtype="float32").eval()
    members = [RewardModel.from_pretrained(folder / "rm" / name, dtype="float32") for name in ("top", "all")]
    for row in (row for row in found["zero2"]["rows"] if row["step"] == 1):
        ids = torch.tensor([row["ids"]])
        with torch.no_grad():
            n = len(row["logprobs"])
            logps = lm(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)[-n:]
            rewards = [(model(ids, torch.ones_like(ids))[0].item() - model.mean) / model.std for model in members]
            hidden = members[0].lm.model(ids).last_hidden_state[0, -n - 1 : -1]
            values = members[0].head(hidden).squeeze(-1)
        for name, expected in (("logprobs", logps), ("ref_logprobs", logps), ("critic_outputs", values)):
            torch.testing.assert_close(torch.tensor(row[name]), expected, **ROUNDING)
        assert row["proxy"] == pytest.approx(sum(rewards) / 2, abs=1e-4)


@pytest.mark.slow
def test_equal_responses_to_a_prompt_have_one_reward_to_the_bit(found):
    """And there are some: the spread of a prompt's rewards must not be rounding."""
    of_ids: dict[tuple, list[float]] = {}
    for row in found["zero2"]["rows"]:
        of_ids.setdefault((row["step"], *row["ids"]), []).append(row["proxy"])
    repeated = [rewards for rewards in of_ids.values() if len(rewards) > 1]
    assert repeated and all(len(set(rewards)) == 1 for rewards in repeated)


def micros(tokenizer) -> list:
    """Nine responses of 1 to 9 tokens behind prompts of other lengths."""
    prompt = tokenizer.prompt_ids(CHATS[0][:1])
    done = [Completion([200 + i] * (1 + (5 * i) % 9), [-1.0] * (1 + (5 * i) % 9), "", True) for i in range(9)]
    prompts = [prompt[-(4 + (7 * i) % 5) :] for i in range(9)]
    made = make_minibatches(prompts, done, list(range(9)), 0, minibatches=3, micro_batch=3, seed=1)
    return [m for minibatch in made for m in minibatch]


@pytest.mark.parametrize("wider", [1, 3])
def test_every_row_gets_its_own_values_back(tokenizer_path, monkeypatch, wider):
    model = tiny_reward_model(tokenizer_path, "mlp")
    rollout = micros(model.tokenizer)
    monkeypatch.setattr("ppo.forward.WIDER", {"cpu": wider})
    forward = Forward(rollout)
    assert len(forward.batches) == 3 // wider
    assert sorted(i for batch in forward.batches for i in batch.rows.tolist()) == list(range(9))
    forward.fill("values", lambda batch: torch.where(batch.is_response, batch.input_ids[:, 1:], 0).float())
    for m in rollout:
        assert m.values.equal(torch.where(m.is_response, m.input_ids[:, 1:], 0).float())
    padding = lambda parts: sum(m.input_ids.numel() for m in parts)  # noqa: E731
    assert wider > 1 or padding(forward.batches) < padding(rollout)


@pytest.mark.parametrize("depth", [1, 2])
def test_frozen_states_reach_batches_and_micro_batches(tokenizer_path, depth):
    """Rewards from the states of either depth equal those without, and each micro-batch has the states of its rows."""
    model = tiny_reward_model(tokenizer_path, "mlp")
    rollout = micros(model.tokenizer)
    layers = FrozenLayers(model.lm, 2, lower=[1])
    forward = Forward(rollout)
    forward.fill_frozen(layers)
    for m in rollout:
        real, expected = m.attention_mask.bool(), layers(m.input_ids, m.attention_mask)
        assert [level.depth for level in m.frozen.levels] == [1, 2]
        for found, apart in zip(m.frozen.levels, expected.levels, strict=True):
            torch.testing.assert_close(found.states[real], apart.states[real], **ROUNDING)
    proxy = LocalProxy([PlainEngine(model, None)], None, [depth])
    rewards = proxy.score([], forward.batches)
    for m in rollout:
        expected = model(m.input_ids, m.attention_mask)[0]
        torch.testing.assert_close(rewards[m.rows], expected, **ROUNDING)
