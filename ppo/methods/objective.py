"""How log-probs become a policy loss: the objectives of GSPO and CISPO, and how tokens are weighed; in pure torch.

Masks and units are those of `ppo.math`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ppo.math import MAX_LOG_RATIO, masked_mean, policy_loss

Aggregation = Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm"]


def loss_denominator(
    kind: Aggregation, mask: Tensor, *, tokens: float, sequences: float, horizon: int
) -> float | Tensor:
    """What the terms of tokens are divided by before they are summed: a number, or [B, 1].

    With l_{i,t} the term of token t of response i, of N responses with |y_i| tokens:

        token-mean                    sum_{i,t} l_{i,t} / sum_i |y_i|        (DAPO, 2503.14476, section 3.3)
        sequence-mean-token-mean      1/N sum_i 1/|y_i| sum_t l_{i,t}        (GRPO, 2402.03300, eq. 3)
        sequence-mean-token-sum-norm  1/N sum_i 1/horizon sum_t l_{i,t}      (Dr. GRPO, 2503.20783, section 3.2)

    The names are verl's; its sum-norm does not divide by N.

    Args:
        mask: [B, T] of a micro-batch.
        tokens, sequences: of the whole minibatch on all ranks, so that micro-batches add up.
        horizon: a constant, the longest response that there can be.
    """
    if kind == "token-mean":
        return tokens
    if kind == "sequence-mean-token-mean":
        return sequences * mask.sum(-1, keepdim=True).clamp(min=1)
    return sequences * horizon


def sequence_log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """log s_{i,t} [B, T] of GSPO-token (2507.18071, eqs. 13 and 14), with gradient.

    Its value is the mean log-ratio of the response, log s_i = 1/|y_i| sum_t log(pi / pi_old) (eq. 7), for every token;
    its gradient is that of the token's own log-prob. Where all tokens of a response have one advantage, and with the
    aggregation sequence-mean-token-mean, value and gradient are those of GSPO (eq. 5).
    """
    logp, old_logp = torch.where(mask, logp, 0.0), torch.where(mask, old_logp, 0.0)
    mean = ((logp - old_logp).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).detach()
    return torch.where(mask, mean + logp - logp.detach(), 0.0)


def gspo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float, **options
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `ppo.math.policy_loss`, with the ratio of the whole response, to the power 1 / its length, for each token.

    GSPO: Zheng et al. (2507.18071), eq. 5. The paper clips to [1 - 3e-4, 1 + 4e-4], as this ratio moves far less.
    """
    shifted = torch.where(mask, old_logp, 0.0)
    return policy_loss(
        shifted + sequence_log_ratio(logp, old_logp, mask), shifted, advantages, mask, clip_low, clip_high, **options
    )


def cispo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    is_weight: Tensor | None = None,
    denominator: float | None = None,
    loss_denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-mean of sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * advantage * log pi.

    CISPO: MiniMax-M1 (2506.13585), eqs. 4 and 5. The weight is clipped and has no gradient, so no token loses its own
    gradient, as those do that PPO clips.

    Args, and what is returned, are those of `ppo.math.policy_loss`; `clipfrac` is the share of clipped weights.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach()
    ratio = log_ratio.exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    stats = {
        "clipfrac": masked_mean((weight != ratio).float(), mask, denominator),
        "approx_kl": masked_mean(ratio - 1 - log_ratio, mask, denominator),
        "ratio_max_dev": (ratio - 1).abs().max(),
    }
    gain = weight * torch.where(mask, advantages, 0.0) * torch.where(mask, logp, 0.0)
    if is_weight is not None:
        gain = gain * torch.where(mask, is_weight, 0.0)
    return -masked_mean(gain, mask, denominator if loss_denominator is None else loss_denominator), stats


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """lambda [B] of GAE for each response: 1 - 1 / (alpha * length), at least 0.

    VAPO: Yue et al. (2504.05118), section 4.2, where alpha is 0.05. The sum of GAE's coefficients, 1 / (1 - lambda), is
    then alpha * length, in proportion to the length.
    """
    return (1 - 1 / (alpha * mask.sum(-1).clamp(min=1))).clamp(min=0.0)


def overlong_penalty(tokens: Tensor, longest: int, buffer: int) -> Tensor:
    """What is added to the reward of responses of so many `tokens` [B]: 0 up to longest - buffer, then falling in a
    line to -1 at `longest` (soft overlong punishment, DAPO, 2503.14476, eq. 13).

    Args:
        longest: the most tokens that a response can have.
        buffer: the last tokens before that, over which the penalty grows.
    """
    return -((tokens - (longest - buffer)) / buffer).clamp(0.0, 1.0)
