"""Reward models of several sizes from one base: layers that are computed apart change no loss, value or reward."""

import pytest
import torch

from bon.scores import score_proxies
from core.config import Model, RewardVariant
from core.config.load import load
from core.data.chat import ChatTokenizer, conversation
from core.files import read_table
from core.models.layers import FrozenLayers, shared_depth, train_top_layers
from core.models.loading import load_causal_lm
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from rm.objective import pair_losses
from rm.pairs import Pair
from rm.variants import build, frozen_state_cache
from study.reward_models import parameters

SIZES = (4, 6)


@pytest.fixture(scope="module")
def cfg(policy_path):
    return load([], [
        f"rm.base.path={policy_path}", "rm.base.attention=eager", "rm.num_layers=6", "rm.trainable_layers=2",
        "rm.cache_frozen_layers=true", "engine.dtype=float32",
    ])  # fmt: skip


@torch.no_grad()
def test_each_size_has_a_cache_of_its_own_layers(cfg):
    for layers in SIZES:
        variant = RewardVariant(num_layers=layers, text_regulariser="dpo_noref", alpha=0.2)
        model, tokenizer = build(cfg.rm, cfg.engine, variant, cfg.run.seed)
        assert len(model.lm.model.layers) == layers
        pairs = [Pair(*(tokenizer.prompt_ids([{"role": "user", "content": "Hi"}]), *map(tokenizer.response_ids, "ab")))]
        cache = frozen_state_cache(cfg.rm, cfg.engine, variant)
        assert cache.layers.depth == layers - 2
        plain = float(pair_losses(model, model, variant, pairs)["loss"])
        assert float(pair_losses(model, model, variant, pairs, cache)["loss"]) == pytest.approx(plain, rel=1e-5)
    assert frozen_state_cache(cfg.rm, cfg.engine).layers.depth == 4  # rm.num_layers
    assert frozen_state_cache(cfg.rm, cfg.engine, RewardVariant(num_layers=2)) is None  # all of its layers are trained


@torch.no_grad()
def test_a_critic_of_another_size_shares_the_frozen_layers_of_the_policy(policy_path):
    where = Model(path=str(policy_path), attention="eager")
    actor, tokenizer = load_causal_lm(where, dtype="float32", num_layers=6), ChatTokenizer(where)
    train_top_layers(actor, 2)
    critic = RewardModel(load_causal_lm(where, dtype="float32", num_layers=4), "mlp", tokenizer).eval()
    train_top_layers(critic.lm, 1)
    depth = shared_depth(actor, critic.lm)
    assert depth == 3
    layers = FrozenLayers(load_causal_lm(where, dtype="float32", num_layers=8), depth)
    for lm in (actor, critic.lm):
        layers.check(lm)
    ids = torch.tensor([tokenizer.prompt_ids([{"role": "user", "content": "Name a fruit."}])])
    mask, read = torch.ones_like(ids), torch.arange(ids.shape[1])
    whole = critic(ids, mask, read=read)[0]
    torch.testing.assert_close(critic(ids, mask, read=read, frozen=layers(ids, mask))[0], whole, atol=1e-6, rtol=1e-5)
    assert whole.std() > 0


def test_pools_are_scored_alike_with_reward_models_of_several_sizes(policy_path, tmp_path):
    where = Model(path=str(policy_path))
    samples = [
        {"prompt_id": p, "sample_id": k, "prompt": [{"role": "user", "content": p}], "response": f"It is {k} {p}."}
        for p in ("one", "another question") for k in range(3)
    ]  # fmt: skip
    expected = {}
    for seed, (name, layers) in enumerate((("a", 4), ("b", 6), ("c", 4), ("d", 6))):  # sizes alternate by name
        torch.manual_seed(seed)
        lm = load_causal_lm(where, dtype="float32", num_layers=layers)
        model = RewardModel(lm, "mlp", ChatTokenizer(where))
        lm.model.layers[-1].mlp.up_proj.weight.data[seed] = 0
        save_reward_model(tmp_path / "rm" / name, model, named_weights(lm), model.head.state_dict())
        loaded = RewardModel.from_pretrained(tmp_path / "rm" / name)
        assert len(loaded.lm.model.layers) == layers
        expected[name] = loaded.score([conversation(s["prompt"], s["response"]) for s in samples])
    score_proxies(tmp_path / "rm", samples, tmp_path)
    for name, rewards in expected.items():
        found = [r["score"] for r in read_table(tmp_path / "scores" / f"{name}.parquet")]
        assert torch.equal(torch.tensor(found), rewards), name
    assert len({tuple(rewards.tolist()) for rewards in expected.values()}) == 4


def test_parameters_of_an_adapter_are_those_of_its_layers(policy_path, tmp_path):
    where = Model(path=str(policy_path))
    lm = load_causal_lm(where, dtype="bfloat16", num_layers=2)
    model = RewardModel(lm, "mlp", ChatTokenizer(where))
    save_reward_model(tmp_path / "whole", model, named_weights(lm), model.head.state_dict())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    expected = sum(p.numel() for p in lm.parameters())
    assert parameters(tmp_path / "whole", str(policy_path), 2) == expected
    assert parameters(tmp_path / "adapter", str(policy_path), 2) == expected


def test_kinds_of_attention_by_layer_are_cut_with_the_layers(tmp_path):
    """Qwen and Gemma list one a layer; a saved model whose list is longer than its layers does not load."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path / "a")
    lm = load_causal_lm(Model(path=str(tmp_path / "a")), dtype="float32", num_layers=2)
    lm.save_pretrained(tmp_path / "b")
    again = load_causal_lm(Model(path=str(tmp_path / "b")), dtype="float32")
    assert len(again.config.layer_types) == len(again.model.layers) == 2
