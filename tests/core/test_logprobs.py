"""Log-probs of tokens from LM-head logits, against autograd through log_softmax."""

import pytest
import torch
import torch.nn.functional as F

from core.models import logprobs as models
from core.models.logits import LmHead


def reference(head: LmHead, hidden, tokens, temperature):
    logits = head.scale * head.linear(hidden).double()
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    logps = F.log_softmax(logits / temperature, dim=-1)
    return logps.gather(-1, tokens[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("form", [(1.0, None), (0.25, None), (1.0, 2.0), (1.5, 2.0)], ids=str)
@pytest.mark.parametrize("kept", [1 << 27, 7 * 97], ids=["kept", "computed again in backward"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(monkeypatch, form, kept, temperature):
    monkeypatch.setattr(models, "KEPT_LOGITS", kept)
    monkeypatch.setattr(models, "_blocks", lambda z: [slice(i, i + 3) for i in range(0, len(z), 3)])
    torch.manual_seed(0)
    head = LmHead(torch.nn.Linear(16, 97), *form)
    hidden = (3 * torch.randn(20, 16)).requires_grad_()
    tokens, weight = torch.randint(97, (20,)), torch.randn(2, 20)
    gradients = []
    for function in (models.token_logprobs, reference):
        options = {"with_entropy": True} if function is models.token_logprobs else {}
        values = function(head, hidden, tokens, temperature, **options)
        loss = (weight[0] * values[0].square()).sum() + (weight[1] * values[1]).sum()
        gradients.append((*values, *torch.autograd.grad(loss, [hidden, *head.linear.parameters()])))
    for found, expected in zip(*gradients, strict=True):
        # float32 against float64: errors are relative to the largest terms of the sums.
        atol = 1e-6 * float(expected.detach().abs().max())
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=atol)


def test_without_entropy_the_gradient_is_the_same():
    torch.manual_seed(1)
    head, tokens = LmHead(torch.nn.Linear(8, 31, bias=False)), torch.randint(31, (5,))
    hidden = torch.randn(5, 8, requires_grad=True)
    found, entropy = models.token_logprobs(head, hidden, tokens, 1.3)
    assert entropy is None
    (mine,) = torch.autograd.grad(found.exp().sum(), hidden)
    (theirs,) = torch.autograd.grad(reference(head, hidden, tokens, 1.3)[0].exp().sum(), hidden)
    torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-6)


def test_bfloat16_logits_are_normalised_in_float32():
    """A vocabulary so large that a bfloat16 sum would lose most of its terms."""
    head = torch.nn.Linear(4, 60_000, bias=False).bfloat16()
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, _ = models.token_logprobs(LmHead(head), hidden, torch.tensor([0, 1, 2]))
    expected = F.log_softmax(head(hidden).float(), -1)[range(3), range(3)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_tokens():
    hidden = torch.randn(0, 8, requires_grad=True)
    found, entropy = models.token_logprobs(LmHead(torch.nn.Linear(8, 31)), hidden, torch.zeros(0, dtype=torch.long))
    assert found.shape == (0,) and entropy is None
    found.sum().backward()
