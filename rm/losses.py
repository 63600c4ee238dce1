"""Losses of reward models: pure functions of rewards and log-probs, in float32.

B pairs. Rewards are [B], one per response. Log-probs are in nats, summed over the tokens of a response.
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
    """Bradley-Terry loss: the mean over pairs of l(d) = -log sigma(d), with d = chosen - rejected - margin.

    Args:
        chosen, rejected: rewards [B].
        margin: [B], by how much the chosen reward should exceed the other (Llama 2, 2307.09288).
        label_smoothing: e in (1 - e) l(d) + e l(-d), as in conservative DPO.
        noise_rate: n, the share of labels taken to be flipped. The loss is [(1 - n) l(d) - n l(-d)] / (1 - 2n), whose
            expectation over the flips is the loss of the clean labels (rDPO, 2403.00409).

    Raises:
        ValueError: a noise rate of a half or more, or both label smoothing and a noise rate.
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
    """-log sigma(mean of the chosen rewards [B]), with the mean inside as in the code of GRM's authors (2406.10216)."""
    return -F.logsigmoid(chosen.float().mean())


def positive_regularised(chosen: Tensor, rejected: Tensor, weight: float = 0.1) -> Tensor:
    """Bradley-Terry plus `weight` times `positive_penalty`; rewards [B]."""
    return bradley_terry(chosen, rejected) + weight * positive_penalty(chosen)


def center_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of (chosen + rejected)^2 over pairs [B]: fixes the offset that Bradley-Terry leaves free (2312.09244)."""
    return (chosen.float() + rejected.float()).square().mean()


def length_disentangling(quality: Tensor, length: Tensor, tokens: Tensor) -> Tensor:
    """ODIN's |corr(quality, tokens)| - corr(length, tokens) over the R responses of a batch (2402.07319, eq. 5).

    Args:
        quality, length: [R], the outputs of the two heads.
        tokens: [R], the lengths of the responses in tokens.
    """
    return correlation(quality, tokens).abs() - correlation(length, tokens)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two vectors [R]; 0 where one of them does not vary."""
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
    """GRM's regulariser of the shared hidden states (2406.10216, section 3), the mean over pairs, in nats.

    With c and r the log-probs of the chosen and the rejected response [B], c0 and r0 those of a reference:

        sft        -log sigma(beta c)
        sft_plain  -c
        dpo_noref  -log sigma(beta (c - r))
        dpo        -log sigma(beta ((c - r) - (c0 - r0)))

    Args:
        chosen_logps, rejected_logps: [B] in nats, each summed over the tokens of the response.
        ref_chosen_logps, ref_rejected_logps: the same by the reference; read by `dpo` only.

    Raises:
        ValueError: an unknown kind, or log-probs that the kind reads and that were not given.
    """
    given = {
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    needs = {"sft": (), "sft_plain": (), "dpo_noref": ("rejected_logps",), "dpo": tuple(given)}
    if kind not in needs:
        raise ValueError(f"text regulariser {kind!r}: known are {', '.join(needs)}")
    if missing := [name for name in needs[kind] if given[name] is None]:
        raise ValueError(f"text regulariser {kind!r} needs {', '.join(missing)}")
    chosen = chosen_logps.float()
    if kind == "sft":
        return -F.logsigmoid(beta * chosen).mean()
    if kind == "sft_plain":
        return -chosen.mean()
    assert rejected_logps is not None
    delta = chosen - rejected_logps.float()
    if kind == "dpo":
        assert ref_chosen_logps is not None and ref_rejected_logps is not None
        delta = delta - (ref_chosen_logps.float() - ref_rejected_logps.float())
    return -F.logsigmoid(beta * delta).mean()


def total_loss(reward_loss: Tensor, regulariser: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * reward_loss + alpha * regulariser as in GRM (2406.10216); alpha = 0 leaves the regulariser out."""
    return (1 - alpha) * reward_loss + alpha * regulariser if alpha else reward_loss
