"""What is computed once, apart or without padding changes no loss, gradient, value or reward."""

import pytest
import torch

from core.config import Model, RewardVariant
from core.config.load import load
from core.data.chat import ChatTokenizer
from core.models.architecture import trunk_of
from core.models.layers import SKIPS_PADDING, FrozenLayers, shared_depth, train_top_layers
from core.models.loading import load_causal_lm
from rm.model import RewardModel
from rm.objective import divided, pair_losses
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


@pytest.fixture
def model(policy_path):
    where = Model(path=str(policy_path))
    torch.manual_seed(0)
    return RewardModel(load_causal_lm(where, dtype="float32", num_layers=3), "mlp", ChatTokenizer(where))


def set_skipping(model, skips: bool) -> None:
    setattr(trunk_of(model.lm), SKIPS_PADDING, skips)
    assert model.skips_padding == skips


def draws(lengths):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(5, 4000, (n,), generator=draw).tolist() for n in lengths]


PAIRS = [Pair(*draws(lengths)) for lengths in ((20, 9, 30), (3, 1, 4), (40, 7, 7))]


@pytest.mark.parametrize("kind", ["none", "sft", "dpo_noref"])
def test_losses_and_gradients_do_not_depend_on_padding(kind, model):
    model.train()
    found = []
    for skips in (True, False):
        set_skipping(model, skips)
        model.zero_grad()
        losses = pair_losses(model, model, RewardVariant(text_regulariser=kind, alpha=0.2), PAIRS)
        losses["loss"].backward()
        found.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (mine, gradients), (padded, expected) = found
    for name, loss in mine.items():
        torch.testing.assert_close(loss, padded[name], atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        limit = 1e-5 * max(float(expected[name].abs().max()), 1e-2)
        torch.testing.assert_close(gradient, expected[name], atol=limit, rtol=1e-3)


@torch.no_grad()
def test_pools_score_as_each_response_alone(model):
    model.eval()
    prompts, responses = draws((9, 14)), draws((5, 1, 12, 40, 7, 7, 3))
    tokens = [(tuple(p), tuple(r)) for p in prompts for r in responses]
    alone = torch.cat([model(ids, torch.ones_like(ids))[0] for p, r in tokens for ids in [torch.tensor([[*p, *r]])]])
    assert alone.unique().numel() == len(tokens)
    for skips in (True, False):
        set_skipping(model, skips)
        for batch_tokens in (8192, 60):
            found = model.score_tokens(tokens, batch_tokens=batch_tokens)
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


def test_a_pool_is_one_row_where_padding_is_left_out(model):
    """A thousand tokens of responses share one pass over their prompt; with padding they would take two rows."""
    (prompt,), responses, seen = draws([300]), draws([50] * 20), []
    tokens = [(tuple(prompt), tuple(r)) for r in responses]
    trunk_of(model.lm).layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
    model.eval().score_tokens(tokens)
    assert seen == [300 + 20 * 50]
    set_skipping(model, False)
    model.score_tokens(tokens)
    assert sum(seen[1:]) > 2 * 300 + 20 * 50


def test_micro_batches_have_equally_many_tokens(model):
    pairs = [Pair(*draws(lengths)) for lengths in ((300, 9, 30), (3, 1, 4), (40, 7, 7), (90, 40, 50), (100, 8, 9))]
    parts = divided(model, pairs, 2)
    sizes = [sum(pairs[i].row for i in part) for part in parts]
    assert sorted(i for part in parts for i in part) == list(range(5)) and max(sizes) < 1.1 * min(sizes)
