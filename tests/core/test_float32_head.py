"""Float32 logits from an LM head in bfloat16."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from core.models import logits as heads
from core.models.logits import LmHead, use_float32_head
from core.models.logprobs import token_logprobs
from tests.builders.processes import run_program
from tests.builders.tiny_lm import tiny_lm


@pytest.mark.parametrize("tied", [False, True])
def test_values_and_gradients_are_those_of_a_float32_head(monkeypatch, tied):
    monkeypatch.setattr(heads, "_blocks", lambda weight: [slice(i, i + 9) for i in range(0, len(weight), 9)])
    lm = tiny_lm(1).bfloat16()
    if tied:
        lm.lm_head.weight = lm.model.embed_tokens.weight
    use_float32_head(lm)
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
    hidden, tokens = torch.randn(11, 32).bfloat16().requires_grad_(), torch.randint(64, (11,))
    found, _ = token_logprobs(LmHead.of(lm), hidden, tokens)
    weight, x = (t.detach().float().requires_grad_() for t in (lm.lm_head.weight, hidden))
    expected = F.linear(x, weight).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad(found.square().sum(), [hidden, lm.lm_head.weight])
    theirs = torch.autograd.grad(expected.square().sum(), [x, weight])
    for mine, own in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, own.bfloat16(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("native", ["bfloat16", "float32"])
def test_logits_are_right_far_below_the_rounding_of_bfloat16(monkeypatch, native):
    """By two products in bfloat16, where a CPU is fast at these, and by one in float32."""
    monkeypatch.setattr(heads, "NATIVE_DTYPE", native)
    draws = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(96, 20_000).bfloat16()
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=draws))
    head.__class__ = heads.Float32Head
    hidden = torch.randn((3, 70, 96), generator=draws).bfloat16()
    exact = F.linear(hidden.double(), head.weight.double(), head.bias.double())
    error = (head(hidden).detach().double() - exact).abs().max() / exact.abs().max()
    assert (
        error
        < 2**-17
        < 2**-10
        < (F.linear(hidden, head.weight, head.bias).double() - exact).abs().max() / exact.abs().max()
    )


def test_a_bfloat16_head_rounds_what_a_float32_head_does_not():
    lm = tiny_lm(1).bfloat16()
    with torch.no_grad():
        lm.lm_head.weight.mul_(50)
    hidden, tokens = torch.randn(200, 32).bfloat16(), torch.randint(64, (200,))
    exact = F.linear(hidden.double(), lm.lm_head.weight.double()).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    rounded, _ = token_logprobs(LmHead.of(lm), hidden, tokens)
    use_float32_head(lm)
    found, _ = token_logprobs(LmHead.of(copy.deepcopy(lm)), hidden, tokens)
    error, before = ((x.detach() - exact).abs().mean().item() for x in (found, rounded))
    largest = F.linear(hidden.double(), lm.lm_head.weight.double()).abs().max().item()
    assert error < 2**-17 * largest and before > 2**-11 * largest


@pytest.mark.slow
def test_under_zero3_the_head_is_gathered_for_both_passes(tmp_path):
    run_program("tests/programs/float32_head.py", tmp_path / "out.json", ranks=2)
    for found in json.loads((tmp_path / "out.json").read_text()).values():
        assert found["dtype"] == "torch.float32" and found["gap"] < 1e-5 and found["gain"] > 0.01, found
