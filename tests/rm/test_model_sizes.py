"""Reward models of several sizes from one base: layers that are computed apart change no loss, value or reward."""

import pytest
import torch

from core.config import Model, RewardVariant
from core.config.load import load
from core.data.chat import ChatTokenizer
from core.models.layers import FrozenLayers, shared_depth, train_top_layers
from core.models.loading import load_causal_lm
from rm.model import RewardModel
from rm.objective import pair_losses
from rm.pairs import Pair
from rm.variants import build, frozen_state_cache

SIZES = (4, 6)


@pytest.fixture(scope="module")
def cfg(policy_path):
    return load([], [
        f"rm.base.path={policy_path}", "rm.base.attention=eager", "rm.num_layers=6", "rm.trainable_layers=2",
        "rm.cache_frozen_layers=true", "engine.dtype=float32",
    ])  # fmt: skip


@pytest.mark.slow
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
