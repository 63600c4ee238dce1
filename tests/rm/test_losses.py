"""Losses of reward models against their formulas in plain Python, signs and limits included."""

import math

import pytest
import torch

from rm.heads import LATENT, InformHead, OdinHead
from rm.losses import (
    bradley_terry,
    center_penalty,
    correlation,
    length_disentangling,
    positive_regularised,
    text_regulariser,
    total_loss,
)

C, R = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([-0.5, 0.4, 1.9])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_bradley_terry_value_sign_and_symmetry():
    assert float(bradley_terry(C, C)) == pytest.approx(math.log(2))
    assert float(bradley_terry(C, R)) == pytest.approx(
        mean(-log_sigmoid(c - r) for c, r in zip(C.tolist(), R.tolist(), strict=True))
    )
    assert bradley_terry(C + 1, R) < bradley_terry(C, R) < bradley_terry(C, R + 1)
    chosen = C.clone().requires_grad_()
    bradley_terry(chosen, R).backward()
    assert (chosen.grad < 0).all()  # raising the reward of the chosen lowers the loss


def test_label_smoothing_and_margin():
    pairs = list(zip(C.tolist(), R.tolist(), strict=True))
    expected = mean(-0.9 * log_sigmoid(c - r) - 0.1 * log_sigmoid(r - c) for c, r in pairs)
    assert float(bradley_terry(C, R, label_smoothing=0.1)) == pytest.approx(expected)
    assert float(bradley_terry(C, R, label_smoothing=0.5)) == pytest.approx(
        float(bradley_terry(R, C, label_smoothing=0.5))
    )
    margin = torch.tensor([0.5, 0.0, 2.0])
    expected = mean(-log_sigmoid(c - r - m) for (c, r), m in zip(pairs, margin.tolist(), strict=True))
    assert float(bradley_terry(C, R, margin=margin)) == pytest.approx(expected)


def test_limits_are_finite():
    big = torch.tensor([1e4])
    assert float(bradley_terry(big, -big)) == 0.0
    assert float(bradley_terry(-big, big)) == pytest.approx(2e4)
    assert bradley_terry(C.bfloat16(), R.bfloat16()).dtype == torch.float32


def test_positive_regularisation_and_centre():
    expected = float(bradley_terry(C, R)) - 0.1 * log_sigmoid(mean(C.tolist()))
    assert float(positive_regularised(C, R)) == pytest.approx(expected)
    assert float(center_penalty(C, R)) == pytest.approx(
        mean((c + r) ** 2 for c, r in zip(C.tolist(), R.tolist(), strict=True))
    )
    assert float(center_penalty(C, -C)) == 0.0


def test_text_regularisers():
    chosen, rejected = torch.tensor([-20.0, -35.0]), torch.tensor([-28.0, -30.0])
    ref_c, ref_r = torch.tensor([-22.0, -33.0]), torch.tensor([-27.0, -34.0])
    beta, pairs = 0.1, ((-20.0, -28.0, 5.0), (-35.0, -30.0, 1.0))  # third: reference's chosen - rejected
    assert float(text_regulariser("sft", chosen, beta=beta)) == pytest.approx(
        mean(-log_sigmoid(beta * c) for c, _, _ in pairs)
    )
    assert float(text_regulariser("sft_plain", chosen, beta=beta)) == pytest.approx(27.5)
    expected = mean(-log_sigmoid(beta * (c - r)) for c, r, _ in pairs)
    assert float(text_regulariser("dpo_noref", chosen, rejected, beta=beta)) == pytest.approx(expected)
    expected = mean(-log_sigmoid(beta * (c - r - ref)) for c, r, ref in pairs)
    assert float(text_regulariser("dpo", chosen, rejected, ref_c, ref_r, beta=beta)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="'dpo' needs ref_chosen_logps, ref_rejected_logps"):
        text_regulariser("dpo", chosen, rejected, beta=beta)
    with pytest.raises(ValueError, match="known are sft"):
        text_regulariser("stf", chosen, beta=beta)


def test_total():
    assert float(total_loss(torch.tensor(2.0), torch.tensor(10.0), 0.25)) == 4.0
    assert float(total_loss(torch.tensor(2.0), torch.tensor(float("inf")), 0.0)) == 2.0


def test_noise_corrected_loss_is_unbiased():
    """Its expectation over flipped labels is the loss of the clean ones, and its gradient too (2403.00409)."""
    n = 0.2
    expected = mean(
        (-(1 - n) * log_sigmoid(c - r) + n * log_sigmoid(r - c)) / (1 - 2 * n)
        for c, r in zip(C.tolist(), R.tolist(), strict=True)
    )
    assert float(bradley_terry(C, R, noise_rate=n)) == pytest.approx(expected)
    flipped = (1 - n) * bradley_terry(C, R, noise_rate=n) + n * bradley_terry(R, C, noise_rate=n)
    assert float(flipped) == pytest.approx(float(bradley_terry(C, R)))
    with pytest.raises(ValueError, match="below 0.5"):
        bradley_terry(C, R, noise_rate=0.5)
    with pytest.raises(ValueError, match="excludes"):
        bradley_terry(C, R, noise_rate=0.1, label_smoothing=0.1)


def test_odin_penalty_is_pearson_of_length():
    tokens = torch.tensor([3, 9, 4, 12])
    quality, length = torch.tensor([0.1, -0.4, 0.9, 0.3]), torch.tensor([1.0, 2.0, 1.5, 2.5])
    pearson = lambda a, b: float(torch.corrcoef(torch.stack([a, b.float()]))[0, 1])  # noqa: E731
    assert float(length_disentangling(quality, length, tokens)) == pytest.approx(
        abs(pearson(quality, tokens)) - pearson(length, tokens), rel=1e-5
    )
    assert float(length_disentangling(-quality, length, tokens)) == pytest.approx(
        float(length_disentangling(quality, length, tokens))
    )
    assert float(correlation(quality, torch.full((4,), 7.0))) == 0.0


def test_inform_head_against_torch_distributions():
    torch.manual_seed(0)
    head, hidden = InformHead(16), torch.randn(5, 16)
    mu, log_std = head.encoder(hidden).split(LATENT, dim=-1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, log_std.exp()), normal(0.0, 1.0)).mean(-1, keepdim=True)
    torch.testing.assert_close(head.training_pass(hidden)[1], expected)
    assert torch.equal(head(hidden), head(hidden))
    draws = torch.stack([head.training_pass(hidden)[0] for _ in range(4000)])
    assert float(draws.std(0).min()) > 0.1
    # the reward at inference is the mean of the sampled ones
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - head(hidden)).abs() < 5 * standard_error).all()


def test_odin_head_is_used_without_its_length_part():
    torch.manual_seed(0)
    head, hidden = OdinHead(16), torch.randn(5, 16)
    total, parts = head.training_pass(hidden)
    assert torch.equal(head(hidden), parts[:, :1])
    torch.testing.assert_close(total, parts[:, :2].sum(-1, keepdim=True))
    overlap = lambda: head.training_pass(hidden)[1][:, 2].tolist()  # noqa: E731
    cosine = torch.cosine_similarity(head.quality.weight, head.length.weight)
    assert overlap() == pytest.approx([abs(float(cosine))] * 5)
    with torch.no_grad():
        head.length.weight.copy_(-2 * head.quality.weight)
        assert overlap() == pytest.approx([1.0] * 5)
        head.quality.weight.copy_(torch.eye(1, 16))
        head.length.weight.copy_(torch.eye(2, 16)[1:])
        assert overlap() == [0.0] * 5
