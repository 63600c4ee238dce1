"""Correction for responses that another policy than the actor sampled: importance weights and masks, in pure torch.

vLLM's log-probs differ from the actor's by rounding, and with `ppo.overlap` by updates too. Masks and units are those
of `ppo.math`. The ratio r is pi_actor / pi_sampler, with the actor before the updates of the step:

    token       r_t, of each token
    sequence    prod_t r_t, one for all tokens of a response
    geometric   (prod_t r_t) ** (1 / |y|), likewise

The weights of tokens and of sequences, cut off at a cap, are the token-level and the sequence-level truncated
importance sampling of Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), and
Liu et al., "When speed kills stability" (2025). The product is unbiased and has a variance that grows with the length.
The geometric mean is biased: verl uses it for masks (docs/algo/rollout_corr_math.md, section 3.3.3), and slime as a
weight too. A mask takes the place of truncation in IcePop (Ring-1T, 2510.18855; INTELLECT-3, 2512.16144, eq. 1):
M(r) is r inside [low, high] and 0 outside. By response it is the masked importance sampling of Liu et al.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config import Clip, ImportanceLevel
from core.training import distributed
from ppo.math import MAX_LOG_RATIO


@dataclass(frozen=True, slots=True)
class Weights:
    """Importance weights of a micro-batch; all are [B, T] and without gradient."""

    weights: Tensor  # what the loss of each token is multiplied by
    ratio: Tensor  # the same before truncation and mask
    truncated: Tensor  # bool, where the ratio is above the cap
    masked: Tensor  # bool, where the weight is 0 by the mask


def ratios(level: ImportanceLevel, logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> Tensor:
    """r [B, T] of each token: its own, or that of its response."""
    log_ratio = (logp - sampler_logp).detach()
    if level != "token":
        whole = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True)
        if level == "geometric":
            whole = whole / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = whole.expand_as(log_ratio)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def importance_weights(clip: Clip, logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> Weights | None:
    """Weights by `clip.importance_weight`, `importance_level` and `importance_mask`; None where there is no correction.

    A masked token stays in the denominator of the loss, as in eq. 1 of INTELLECT-3.

    Args:
        logp: [B, T] of the actor.
        sampler_logp: [B, T] of vLLM.
        mask: [B, T].
    """
    cap, outside = clip.importance_weight, clip.importance_mask
    if cap is None and outside is None:
        return None
    ratio = ratios(clip.importance_level, logp, sampler_logp, mask)
    # NaN stays NaN, for `ppo.guard` to see, here and below, where the mask is not the negation of "inside".
    weights = torch.where(ratio.isnan(), ratio, 1.0) if cap is None else ratio.clamp(max=cap)
    truncated, masked = torch.zeros_like(mask) if cap is None else ratio > cap, torch.zeros_like(mask)
    if outside is not None:
        of_mask = ratios(outside.level, logp, sampler_logp, mask)
        masked = (of_mask < outside.low) | (of_mask > outside.high)
        weights = torch.where(masked, 0.0, weights)
    return Weights(weights, ratio, truncated & ~masked, masked)


def correction_metrics(clip: Clip, found: Sequence[tuple[Tensor, Weights]]) -> dict[str, float]:
    """What the correction did to the response tokens of all ranks. Every rank must call it.

    Args:
        found: mask [B, T] of the response tokens of each micro-batch, and its weights; empty where there are none.

    Returns:
        `is_weight_mean` and `is_weight_max` of the weights as the loss has them, masked ones among them,
        `is_ratio_max` before truncation and mask, and `is_truncated_share` and `is_masked_share`: of the tokens at
        level token, else of the responses. {} where there is no correction.
    """
    if not found:
        return {}
    of_mask = clip.importance_mask.level if clip.importance_mask else "token"
    read = distributed.numbers([
        {"tokens": mask.sum(), "total": w.weights[mask].double().sum(),
         "truncated": _count(w.truncated, mask, clip.importance_level), "masked": _count(w.masked, mask, of_mask),
         "weight": w.weights[mask].max(), "ratio": w.ratio[mask].max()}
        for mask, w in found
    ])  # fmt: skip
    sums = [sum(row[name] for row in read) for name in ("tokens", "total", "truncated", "masked")]
    *sums, rows = distributed.global_sum(*sums, float(sum(len(mask) for mask, _ in found)))
    tokens, total, truncated, masked = sums
    of = {"token": tokens}
    result = {
        "is_weight_mean": total / tokens,
        "is_weight_max": distributed.global_max(max(row["weight"] for row in read)),
        "is_ratio_max": distributed.global_max(max(row["ratio"] for row in read)),
        "is_truncated_share": truncated / of.get(clip.importance_level, rows),
    }
    return result | ({"is_masked_share": masked / of.get(of_mask, rows)} if clip.importance_mask else {})


def _count(chosen: Tensor, mask: Tensor, level: ImportanceLevel) -> Tensor:
    """Of tokens or, where all tokens of a response are alike, of responses."""
    chosen = chosen & mask
    return (chosen if level == "token" else chosen.any(-1)).sum()
