"""The reward model on the real backbone, in float32: one text, one score, however it is batched or stored."""

import math

import pytest
import torch

from core.batching import pack, pad_right
from core.config import Model, RewardVariant
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.models.layers import FrozenLayers, shared_depth, train_top_layers
from core.models.loading import load_causal_lm
from core.models.state_cache import FrozenStateCache
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.losses import bradley_terry, text_regulariser, total_loss
from rm.model import RewardModel, last_real_token
from rm.objective import pair_logprobs, pair_losses
from rm.pairs import Pair

CHATS = [
    [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    for q, a in (
        ("Name a fruit.", "An apple is a fruit."),
        ("Why do cats purr?", "Often because they are content; sometimes to calm themselves when they are hurt."),
        ("Say hello.", ""),
    )
]


@pytest.fixture(scope="module")
def model(policy_path):
    where = Model(path=str(policy_path), attention="eager")
    torch.manual_seed(0)
    return RewardModel(load_causal_lm(where, dtype="float32", num_layers=4), "mlp", ChatTokenizer(where)).eval()


def test_scores_do_not_depend_on_the_batch(model):
    together = model.score(CHATS)
    alone = torch.cat([model.score([chat]) for chat in CHATS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert len(set(together.tolist())) == 3
    assert torch.equal(model.score(CHATS), together)
    torch.testing.assert_close(model.score(CHATS[::-1]).flip(0), together, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_left_and_right_padding_agree(model):
    rows = [model.tokenizer.conversation_ids(chat) for chat in CHATS]
    ids, mask = pad_right(rows, model.tokenizer.pad_id)
    left = torch.stack([row.roll(ids.shape[1] - int(m.sum())) for row, m in zip(ids, mask, strict=True)])
    left_mask = mask.flip(1)
    assert last_real_token(mask).tolist() == [len(r) - 1 for r in rows]
    torch.testing.assert_close(model(left, left_mask)[0], model(ids, mask)[0], atol=1e-5, rtol=1e-4)
    # what the padding holds does not matter
    poisoned = ids.masked_fill(mask == 0, model.tokenizer.eot_id)
    assert torch.equal(model(poisoned, mask)[0], model(ids, mask)[0])


def test_saved_and_loaded_scores_are_equal(model, tmp_path):
    model.mean, model.std = 0.25, 2.0
    save_reward_model(tmp_path, model, named_weights(model.lm), model.head.state_dict())
    loaded = RewardModel.from_pretrained(tmp_path, dtype="float32", attention="eager")
    assert torch.equal(loaded.score(CHATS), model.score(CHATS))
    assert float(loaded.normalise(torch.tensor(2.25))) == 1.0


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(model, tmp_path):
    head = model.head.state_dict()
    head.pop("2.bias")
    save_reward_model(tmp_path, model, named_weights(model.lm), head)
    with pytest.raises(ArtefactError, match=r"mlp head: 2\.bias"):
        RewardModel.from_pretrained(tmp_path, dtype="float32")
    save_reward_model(tmp_path, model, [w for w in named_weights(model.lm) if "layers.2.mlp.up" not in w[0]], head)
    with pytest.raises(ArtefactError, match="layers.2.mlp.up_proj"):
        RewardModel.from_pretrained(tmp_path, dtype="float32")
    with pytest.raises(ArtefactError, match="run `grm rm` first"):
        RewardModel.from_pretrained(tmp_path / "nothing")


def test_grm_loss_by_hand(model):
    """One pair: (1 - a) * BT + a * -logsigmoid(b * sum log pi(chosen | prompt)), from full logits in float64."""
    tok = model.tokenizer
    pair = Pair(tok.prompt_ids(CHATS[1][:1]), tok.response_ids("They are content."), tok.response_ids("No idea."))
    variant = RewardVariant(text_regulariser="sft", alpha=0.2, beta=0.1)
    with torch.no_grad():
        found = float(pair_losses(model, model, variant, [pair])["loss"])
        rewards = []
        for response in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + response])
            hidden = model.lm.model(ids).last_hidden_state
            rewards.append(float(model.head(hidden[0, -1])))
            if response is pair.chosen:
                logps = model.lm.lm_head(hidden)[0].double().log_softmax(-1)
                total = sum(float(logps[t - 1, ids[0, t]]) for t in range(len(pair.prompt), ids.shape[1]))
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    expected = -0.8 * log_sigmoid(rewards[0] - rewards[1]) - 0.2 * log_sigmoid(0.1 * total)
    assert found == pytest.approx(expected, rel=1e-4)


def test_responses_that_share_a_prompt_score_as_alone(model):
    answers = ["An apple.", "Oranges and apples, both of which grow on trees.", "", "No."]
    chats = [[q[0], {"role": "assistant", "content": a}] for q in (CHATS[0], CHATS[1]) for a in answers]
    alone = torch.cat([model.score([chat]) for chat in chats])
    torch.testing.assert_close(model.score(chats), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.score(chats, batch_tokens=64), alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.score(chats), model.score(chats))
    tok = model.tokenizer
    groups = [(tok.prompt_ids(c[0][:-1]), [tok.response_ids(a) for a in answers]) for c in (chats[:1], chats[4:])]
    assert len(pack(groups, tok.pad_id).input_ids) == 2  # the prompts were indeed shared


@torch.no_grad()
def test_log_probs_of_responses_that_share_a_prompt_are_those_alone(model):
    tok = model.tokenizer
    prompt, answers = tok.prompt_ids(CHATS[1][:1]), [tok.response_ids(a) for a in ("To calm down.", "Who knows?", "")]
    batch = pack([(prompt, answers), (prompt[:-2], answers[:1])], tok.pad_id)
    found = model(
        batch.input_ids,
        batch.attention_mask,
        positions=batch.positions,
        read=batch.ends,
        targets=batch.targets([0, 1, 3]),
    )[1]
    for r, (context, answer) in {
        0: (prompt, answers[0]),
        1: (prompt, answers[1]),
        3: (prompt[:-2], answers[0]),
    }.items():
        ids = torch.tensor([context + answer])
        logps = model.lm(ids).logits[0].double().log_softmax(-1)
        alone = sum(float(logps[t - 1, ids[0, t]]) for t in range(len(context), ids.shape[1]))
        assert float(found[r]) == pytest.approx(alone, rel=1e-4)
    assert float(found[2]) == 0.0


@torch.no_grad()
def test_frozen_layers_computed_apart_change_nothing(model, policy_path):
    where = Model(path=str(policy_path), attention="eager")
    base = load_causal_lm(where, dtype="float32", num_layers=4)
    layers = FrozenLayers(base, 2)
    layers.check(model.lm)
    assert len(base.model.layers) == 4
    ids, mask = pad_right([model.tokenizer.conversation_ids(chat) for chat in CHATS], model.tokenizer.pad_id)
    assert torch.equal(model(ids, mask, frozen=layers(ids, mask))[0], model(ids, mask)[0])
    broken = load_causal_lm(where, dtype="float32", num_layers=4).requires_grad_(False)
    assert shared_depth(base.requires_grad_(False), broken) == 4
    broken.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    assert shared_depth(base, broken) == 1
    broken.model.layers[1].mlp.up_proj.weight.mul_(-1)
    with pytest.raises(ArtefactError, match="first 2 layers"):
        layers.check(broken)


def pairs_of(tokenizer, margins=(0.5, 2.0)) -> list[Pair]:
    answers = (("Blue, mostly.", "No."), ("Because of the wind and the moon.", "Waves are made of water, I think."))
    questions = ("What colour is the sky?", "Why are there waves?")
    return [
        Pair(
            tokenizer.prompt_ids([{"role": "user", "content": q}]), *map(tokenizer.response_ids, a), margin=m,
            reference=(-20.0 - i, -15.0),
        )
        for i, (q, a, m) in enumerate(zip(questions, answers, margins, strict=True))
    ]  # fmt: skip


def plainly(model, pair: Pair, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward and summed log-prob of one conversation by itself, without anything of rm.objective."""
    answer = getattr(pair, side)
    out = model.lm(torch.tensor([pair.prompt + answer]), output_hidden_states=True)
    logps = out.logits[0].float().log_softmax(-1)
    first = len(pair.prompt)
    return model.head(out.hidden_states[-1][0, -1:]).squeeze(), sum(
        logps[first + i - 1, token] for i, token in enumerate(answer)
    )


VARIANTS = [
    {},
    {"margin": 1.0},
    {"label_smoothing": 0.1},
    {"noise_rate": 0.2},
    {"positive": 0.1, "center": 0.01},
    {"text_regulariser": "sft", "alpha": 0.3},
    {"text_regulariser": "sft_plain", "alpha": 0.01},
    {"text_regulariser": "dpo_noref", "alpha": 0.3},
    {"text_regulariser": "dpo", "alpha": 0.3},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_loss_of_every_variant_from_conversations_one_by_one(model, options):
    variant = RewardVariant(**options)
    pairs = pairs_of(model.tokenizer)
    with torch.no_grad():
        (c, lc), (r, lr) = (
            map(torch.stack, zip(*(plainly(model, p, side) for p in pairs), strict=True))
            for side in ("chosen", "rejected")
        )
    margin = torch.tensor([p.margin for p in pairs]) if variant.margin else None
    expected = bradley_terry(
        c, r, margin=margin, label_smoothing=variant.label_smoothing, noise_rate=variant.noise_rate
    )
    if variant.positive:
        expected = expected + 0.1 * math.log1p(math.exp(-float(c.mean()))) + 0.01 * ((c + r) ** 2).mean()
    if variant.text_regulariser != "none":
        ref = torch.tensor([p.reference for p in pairs]).unbind(-1)
        term = text_regulariser(variant.text_regulariser, lc, lr, *ref, beta=variant.beta)
        expected = total_loss(expected, term, variant.alpha)
    found = pair_losses(model, model, variant, pairs)
    assert float(found["loss"].detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "mlp", "inform", "odin"])
def test_every_head_learns_a_pair(policy_path, head):
    where = Model(path=str(policy_path), attention="eager")
    torch.manual_seed(0)
    lm = load_causal_lm(where, dtype="float32", num_layers=2)
    train_top_layers(lm, 0)
    model = RewardModel(lm, head, ChatTokenizer(where))
    assert not any(p.requires_grad for p in lm.parameters())  # a frozen backbone
    pairs, variant = pairs_of(model.tokenizer), RewardVariant(head=head, head_weight=0.01)
    optimiser = torch.optim.Adam(model.head.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        pair_losses(model, model, variant, pairs)["loss"].backward()
        optimiser.step()
    chats = lambda side: [(p.prompt, [getattr(p, side)]) for p in pairs]  # noqa: E731
    with torch.no_grad():
        chosen, rejected = (
            model(b.input_ids, b.attention_mask, read=b.ends)[0]
            for b in (pack(chats(side), model.tokenizer.pad_id) for side in ("chosen", "rejected"))
        )
    assert (chosen > rejected).all()


@torch.no_grad()
def test_cached_frozen_states_give_the_same_loss(model, policy_path):
    base = load_causal_lm(Model(path=str(policy_path), attention="eager"), dtype="float32", num_layers=4)
    layers, passes = FrozenLayers(base, 2), []
    cache = FrozenStateCache(layers)
    base.register_forward_pre_hook(lambda *_: passes.append(1))
    base.model.register_forward_pre_hook(lambda *_: passes.append(1))
    pairs, variant = pairs_of(model.tokenizer), RewardVariant(text_regulariser="dpo_noref", alpha=0.2)
    plain = float(pair_losses(model, model, variant, pairs)["loss"])
    assert float(pair_losses(model, model, variant, pairs, cache)["loss"]) == pytest.approx(plain, rel=1e-5)
    computed = len(passes)
    assert float(pair_losses(model, model, variant, pairs[::-1], cache)["loss"]) == pytest.approx(plain, rel=1e-5)
    assert computed and len(passes) == computed  # the second pass read what the first had kept
    flipped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]  # as label noise does
    pair_losses(model, model, variant, flipped, cache)
    found = model.score_tokens([(tuple(p.prompt), tuple(p.chosen)) for p in pairs], frozen=cache)  # as validation does
    assert len(passes) == computed
    torch.testing.assert_close(
        found, model.score_tokens([(tuple(p.prompt), tuple(p.chosen)) for p in pairs]), atol=1e-5, rtol=1e-4
    )
    other = [Pair(pairs[0].prompt[:-1], pairs[0].chosen, pairs[0].rejected)]
    expected = float(pair_losses(model, model, variant, other)["loss"])
    assert float(pair_losses(model, model, variant, other, cache)["loss"]) == pytest.approx(expected, rel=1e-5)
    assert len(passes) > computed


def test_only_rows_that_are_not_known_are_computed(model, policy_path):
    base = load_causal_lm(Model(path=str(policy_path), attention="eager"), dtype="float32", num_layers=4)
    layers, tokens = FrozenLayers(base, 2), []
    cache = FrozenStateCache(layers)
    base.model.layers[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[:2].numel()))
    first, second = pairs_of(model.tokenizer)
    pair_losses(model, model, RewardVariant(), [first], cache)
    del tokens[:]
    plain = float(pair_losses(model, model, RewardVariant(), [first, second])["loss"])
    assert float(pair_losses(model, model, RewardVariant(), [first, second], cache)["loss"]) == pytest.approx(plain)
    assert tokens == [second.row]


@torch.no_grad()
def test_reference_log_probs_and_every_assistant_turn(model):
    pair = pairs_of(model.tokenizer)[1]
    [(chosen, rejected)] = pair_logprobs(model, model, [pair])
    assert chosen == pytest.approx(float(plainly(model, pair, "chosen")[1]), rel=1e-4)
    assert rejected == pytest.approx(float(plainly(model, pair, "rejected")[1]), rel=1e-4)
    tok = model.tokenizer
    chat = [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "Apple."},
        {"role": "user", "content": "Another."},
    ]
    [(start, stop)] = tok.assistant_spans(chat)
    prompt = tok.prompt_ids(chat)
    assert prompt[start:stop] == tok.response_ids("Apple.") and tok.decode(prompt[start:stop]) == "Apple."
    whole = Pair(prompt, tok.response_ids("Pear."), tok.response_ids("A chair."), ((start, stop),))
    [(found, _)] = pair_logprobs(model, model, [whole])
    answer = Pair(prompt, whole.chosen, whole.rejected)
    earlier = Pair(prompt[:start], prompt[start:stop], whole.rejected)
    parts = sum(float(plainly(model, p, "chosen")[1]) for p in (answer, earlier))
    assert found == pytest.approx(parts, rel=1e-4)
