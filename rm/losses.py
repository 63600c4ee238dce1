"""Losses of reward models: pure functions of rewards and log-probs, in float32. B pairs.

log-probs are sums over response tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    noise_rate: float = 0.0,
) -> Tensor:
    """Mean of -(1-e) log sigma(d - m) - e log sigma(-(d - m)), d = chosen - rejected [B].

    Margin m [B] as in Llama 2 (2307.09288); label smoothing e as in conservative DPO. `noise_rate` n is the share of
    labels known to be flipped: [(1-n) l(d) - n l(-d)] / (1-2n), whose expectation over flips is the loss of clean
    labels (rDPO, 2403.00409).

    Raises:
        ValueError: a noise rate of half or more, or both label smoothing and a noise rate.
    """
    if noise_rate and (label_smoothing or not 0 <= noise_rate < 0.5):
        raise ValueError(f"noise_rate {noise_rate} must be below 0.5 and excludes label_smoothing {label_smoothing}")
    delta = chosen.float() - rejected.float()
    if margin is not None:
        delta = delta - margin.float()
    right, wrong = -F.logsigmoid(delta), -F.logsigmoid(-delta)
    if noise_rate:
        return (((1 - noise_rate) * right - noise_rate * wrong) / (1 - 2 * noise_rate)).mean()
    return ((1 - label_smoothing) * right + label_smoothing * wrong).mean()


def positive_penalty(chosen: Tensor) -> Tensor:
    """-log sigma(mean chosen), the batch mean inside, as in the authors' code of 2406.10216."""
    return -F.logsigmoid(chosen.float().mean())


def positive_regularised(chosen: Tensor, rejected: Tensor, weight: float = 0.1) -> Tensor:
    """Bradley-Terry plus `weight` times `positive_penalty`."""
    return bradley_terry(chosen, rejected) + weight * positive_penalty(chosen)


def center_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """mean (chosen + rejected)^2: pins the offset that Bradley-Terry leaves free (2312.09244)."""
    return (chosen.float() + rejected.float()).square().mean()


def length_disentangling(quality: Tensor, length: Tensor, tokens: Tensor) -> Tensor:
    """ODIN's |corr(quality, tokens)| - corr(length, tokens) over the responses of a batch [R] (2402.07319, eq. 5)."""
    return correlation(quality, tokens).abs() - correlation(length, tokens)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two vectors [R]; 0 when one does not vary."""
    a, b = (x.float() - x.float().mean() for x in (a, b))
    scale = (a.square().sum() * b.square().sum()).clamp(min=1e-12).sqrt()
    return (a * b).sum() / scale


def text_regulariser(
    kind: str,
    chosen_logps: Tensor,
    rejected_logps: Tensor | None = None,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float,
) -> Tensor:
    """GRM's regulariser of the shared hidden states (2406.10216, section 3), from log-probs [B] in nats.

    sft: -log sigma(b log pi(chosen)); sft_plain: -log pi(chosen); dpo_noref:
    -log sigma(b (chosen - rejected)); dpo: the same of log-ratios to a reference.
    """
    needs = {
        "sft": {},
        "sft_plain": {},
        "dpo_noref": {"rejected_logps": rejected_logps},
        "dpo": {
            "rejected_logps": rejected_logps,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
        },
    }
    if kind not in needs:
        raise ValueError(f"text regulariser {kind!r}: known are {', '.join(needs)}")
    if missing := [name for name, value in needs[kind].items() if value is None]:
        raise ValueError(f"text regulariser {kind!r} needs {', '.join(missing)}")
    chosen = chosen_logps.float()
    if kind == "sft":
        return -F.logsigmoid(beta * chosen).mean()
    if kind == "sft_plain":
        return -chosen.mean()
    delta = chosen - rejected_logps.float()
    if kind == "dpo":
        delta = delta - (ref_chosen_logps.float() - ref_rejected_logps.float())
    return -F.logsigmoid(beta * delta).mean()


def total_loss(reward_loss: Tensor, regulariser: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * reward loss + alpha * regulariser; alpha = 0 is plain Bradley-Terry."""
    return (1 - alpha) * reward_loss + alpha * regulariser if alpha else reward_loss
