"""ODIN's correlations with length, over the batch of an optimiser step: their gradient, and what they leave."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from core.batching import pack
from core.config import Model, RewardVariant
from core.data.chat import ChatTokenizer
from core.models.layers import train_top_layers
from rm import train
from rm.model import RewardModel
from rm.pairs import Pair
from tests.builders.checkpoints import tiny_config
from tests.builders.plain_engine import PlainEngine

GOOD, BAD, FILLER = range(10, 20), range(20, 30), range(30, 60)
"""Tokens of the planted problem."""
WIDTH = 32


@pytest.fixture(autouse=True)
def one_thread():
    """Faster for tensors of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planted_model(tokenizer_path: Path, head: str, dropout: float = 0.0) -> RewardModel:
    """The mean of the embeddings so far, in which one dimension tells good from bad tokens and one counts filler.

    Only the head is trained, so that nothing but its loss decides which of them the reward reads.
    """
    torch.manual_seed(0)
    chat = ChatTokenizer(Model(path=str(tokenizer_path)))
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    lm = LlamaForCausalLM(tiny_config(chat.hf, **shape))
    attention, embeddings = lm.model.layers[0].self_attn, lm.model.embed_tokens.weight
    with torch.no_grad():
        for weight in (attention.q_proj.weight, attention.k_proj.weight, lm.model.layers[0].mlp.down_proj.weight):
            weight.zero_()
        attention.v_proj.weight.copy_(torch.eye(WIDTH))
        attention.o_proj.weight.copy_(5 * torch.eye(WIDTH))
        embeddings.normal_(std=0.05)
        for tokens, dimension, value in ((GOOD, 0, 1.0), (BAD, 0, -1.0), (FILLER, 1, 1.0)):
            embeddings[tokens[0] : tokens[-1] + 1, dimension] += value
    train_top_layers(lm, 0)
    model = RewardModel(lm, head, chat)
    model.head_dropout = dropout
    return model


def planted_pairs(eot: int, n: int, seed: int) -> list[Pair]:
    """In 85% the chosen response has the good token, in 80% it is the longer one."""
    rng = random.Random(seed)

    def response(filler: int, marks: range) -> list[int]:
        tokens = [rng.choice(FILLER) for _ in range(filler)]
        return [*tokens, rng.choice(marks), eot]

    pairs = []
    for _ in range(n):
        short, long = sorted(rng.sample(range(1, 25), 2))
        lengths = (long, short) if rng.random() < 0.8 else (short, long)
        marks = (GOOD, BAD) if rng.random() < 0.85 else (BAD, GOOD)
        pairs.append(Pair([rng.randint(60, 90) for _ in range(6)], *map(response, lengths, marks)))
    return pairs


def steps(model: RewardModel, head: str, passes: int, count: int, size: int = 8) -> tuple[dict, PlainEngine]:
    """`count` optimiser steps of `size` pairs in that many passes each; the last row of the log, and the engine."""
    data, rng = planted_pairs(model.tokenizer.eot_id, 256, seed=1), random.Random(0)
    optimiser = torch.optim.Adam(model.head.parameters(), lr=0.0)
    engine, variant = PlainEngine(model, optimiser, passes), RewardVariant(head=head, head_weight=1.0)
    row: dict = {}
    for step in range(count):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / count)
        torch.manual_seed(step)
        row = train.train_step(engine, model, variant, rng.sample(data, size), None)
    return row, engine


@pytest.mark.parametrize("passes", [2, 4, 8])
def test_the_gradient_of_many_passes_is_that_of_one_large_batch(tokenizer_path, passes):
    weights = []
    for n in (1, passes):
        model = planted_model(tokenizer_path, "odin")
        row, _ = steps(model, "odin", n, 3)
        weights.append((row, {name: w.detach() for name, w in model.head.named_parameters()}))
    (one, expected), (many, found) = weights
    assert many == pytest.approx(one, rel=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_both_passes_drop_the_same_inputs(tokenizer_path, monkeypatch):
    """The rewards whose correlation is taken are those that get its gradient, with dropout too."""
    seen: list[list[float]] = []
    model = planted_model(tokenizer_path, "odin", dropout=0.5)
    inner = model.head.training_pass

    def spy(hidden):
        rewards, terms = inner(hidden)
        seen.append(terms.flatten().tolist())
        return rewards, terms

    monkeypatch.setattr(model.head, "training_pass", spy)
    steps(model, "odin", 4, 1)
    assert len(seen) == 8 and seen[:4] == seen[4:] and seen[0] != seen[1]


def left_to_length(model: RewardModel) -> float:
    """Share of the variance of held-out rewards that the length of the response explains."""
    held_out = planted_pairs(model.tokenizer.eot_id, 128, seed=2)
    batch = pack([(p.prompt, [p.chosen, p.rejected]) for p in held_out], model.tokenizer.pad_id)
    with torch.no_grad():
        rewards = model.eval()(batch.input_ids, batch.attention_mask, positions=batch.positions, read=batch.ends)[0]
    lengths = [len(side) for p in held_out for side in (p.chosen, p.rejected)]
    return float(np.corrcoef(rewards, lengths)[0, 1] ** 2)


@pytest.mark.slow
def test_quality_is_left_without_length_at_one_pair_a_pass(tokenizer_path, monkeypatch):
    def trained(head: str, passes: int) -> float:
        model = planted_model(tokenizer_path, head)
        steps(model, head, passes, count=40)
        return left_to_length(model)

    assert trained("odin", 8) < 0.05 < 0.2 < trained("linear", 1)
    monkeypatch.setattr(train, "batch_correlations", lambda engine, model, mine, cache: [None] * len(mine))
    assert trained("odin", 8) > 0.1  # within one pair a correlation is 1 or -1, and has no gradient
