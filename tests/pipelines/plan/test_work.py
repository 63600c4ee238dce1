"""Counted operations, steps and tokens against brute force."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from core.config import Lora
from core.models.layers import FrozenStates, hidden_states, train_top_layers
from core.models.lora import add_lora
from pipelines.plan.work import Logits, Pass, Sample
from tests.builders.plan.sizes import TINY, tiny_shape

ROWS, LENGTH = 3, 16


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def tiny() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY | {"tie_word_embeddings": True}, attn_implementation="eager"))


def inputs():
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 90
    return ids, torch.ones_like(ids), torch.randn(ROWS, LENGTH, TINY["hidden_size"])


def work(layers: int, trained=None) -> Pass:
    return Pass(tiny_shape(), 1, ROWS * LENGTH, LENGTH, layers, trained)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_forward_pass(layers):
    lm, (ids, mask, states) = tiny().requires_grad_(False), inputs()
    frozen = FrozenStates(4 - layers, states) if layers < 4 else None
    found = flops_of(lambda: hidden_states(lm, ids, mask, frozen=frozen))
    assert work(layers).flops == pytest.approx(found, rel=0.01)  # rotary frequencies are not counted


@pytest.mark.parametrize(("kind", "most"), [("weights", 0.04), ("lora", 0.04)])
def test_a_training_pass(kind, most):
    """The lowest trained layer passes no gradient on to its inputs, and adapters are not counted."""
    ids, mask, states = inputs()
    if kind == "weights":
        lm = tiny()
        train_top_layers(lm, 2)
    else:
        lm = add_lora(tiny(), Lora(rank=1, top_layers=2))
    states.requires_grad_(kind == "weights")
    counted = flops_of(lambda: hidden_states(lm, ids, mask, frozen=FrozenStates(2, states)).sum().backward())
    if kind == "lora":  # A x and B a forward, twice that backward
        counted -= 3 * 2 * ROWS * LENGTH * tiny_shape().lora_params(Lora(rank=1, top_layers=2))
    assert work(2, kind).flops == pytest.approx(counted, rel=most)


@pytest.mark.parametrize("backward", [False, True])
def test_logits(backward):
    lm = tiny().requires_grad_(False)
    hidden = torch.randn(7, TINY["hidden_size"], requires_grad=backward)

    def call():
        logits = lm.lm_head(hidden)
        if backward:
            logits.sum().backward()

    assert Logits(tiny_shape(), 1, 7, backward).flops == flops_of(call)


@pytest.mark.parametrize(("sequences", "concurrency"), [(8, 16), (16, 16), (80, 16)])
def test_decoding_steps_are_those_of_continuous_batching(sequences, concurrency):
    """A queue of sequences of drawn lengths, each taking a place as soon as one is free."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        lengths = torch.randint(1, 49, (sequences,), generator=draw).tolist()
        waiting, running, steps = lengths[concurrency:], lengths[:concurrency], 0
        while running:
            steps += 1
            running = [n - 1 for n in running if n > 1]
            while waiting and len(running) < concurrency:
                running.append(waiting.pop())
        found.append(steps)
    mean = sum(found) / len(found)
    counted = Sample(tiny_shape(), 1, sequences, sequences, 20, 24.5, 48, concurrency, 32).steps
    assert counted == pytest.approx(mean, rel=0.12)


def test_prompts_are_computed_once_in_whole_blocks():
    sample = Sample(tiny_shape(), 1, 12, 3, 70, 10, 20, 64, 32)
    assert sample.prefill == 3 * 70 + 9 * (70 - 64 + 1)
    assert Sample(tiny_shape(), 1, 3, 3, 70, 10, 20, 64, 32).prefill == 3 * 70
