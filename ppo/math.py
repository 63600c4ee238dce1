"""The mathematics of PPO, in pure torch. B responses, T tokens, V vocabulary.

Log-probs and KLs are in nats. Masks are bool [B, T], True on response tokens, the end of turn included. Where a mask is
False a tensor may hold anything, NaN too: it changes neither values nor gradients.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this size before exp, so that a ratio never overflows."""


def logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Float32 log-probs [B, T] of `tokens` [B, T] under softmax(logits [B, T, V] / temperature)."""
    return (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log pi - log pi_0 of tokens sampled from pi: unbiased for KL(pi || pi_0), may be negative.

    The estimators k1, k2 and k3 are those of Schulman, "Approximating KL divergence" (2020), elementwise.
    """
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log pi - log pi_0)^2 / 2 of tokens sampled from pi: biased, with a small variance near pi_0."""
    return 0.5 * (logp - ref_logp).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """pi_0/pi - 1 - log(pi_0/pi) of tokens sampled from pi: unbiased and never negative."""
    log_ratio = ref_logp - logp
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 - log_ratio


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || pi_0) [...] of the distributions softmax(logits [..., V]), summed over the vocabulary, in float32."""
    logp, ref = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref)).sum(-1)


def kl_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """KL(pi || pi_0) as a term of the loss: a scalar, the mean over response tokens sampled from pi.

    Its value is that of k3. Its gradient is that of k2, (log pi - log pi_0) d log pi, whose expectation is the gradient
    of KL(pi || pi_0); the gradient of k3 has that of the reverse KL as its expectation.

    Args:
        logp, ref_logp: [B, T] of the policy, with gradient, and of the reference.
        denominator: as in `masked_mean`.
    """
    logp, ref_logp = torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0)
    k2, k3 = kl_k2(logp, ref_logp), kl_k3(logp, ref_logp).detach()
    return masked_mean(k2 - k2.detach() + k3, mask, denominator)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """Rewards per token [B, T]: -coef * kl on every response token, and the score on the last one (1909.08593, eq. 2).

    Args:
        scores: [B], rewards of whole responses.
        kl: [B, T], the estimate of each token.
    """
    rewards = torch.where(mask, -coef * kl, 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * columns).argmax(-1)
    at_end = (columns == last[:, None]) & mask
    return rewards + torch.where(at_end, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438, eq. 16).

    In each row the mask is one run of True. The value after the last token is 0.

    Args:
        rewards: [B, T] per token.
        values: [B, T], the critic's value of the state before each token.
        lam: lambda, for all responses or [B].

    Returns:
        Advantages, and returns = advantages + values where the mask is True; both [B, T].
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        advantages[:, t] = running
        following = values[:, t]
    return advantages, advantages + values


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum_k gamma^k r_{t+k} [B, T]: what GAE with lambda = 1 gives without a critic."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def rloo(returns: Tensor, groups: Tensor) -> Tensor:
    """Advantages [N]: each response's return less the mean return of the others to its prompt (2402.14740, eq. 7).

    Args:
        returns: [N] of whole responses.
        groups: [N], equal for responses to one prompt; at least two responses per prompt.
    """
    sums, counts = _of_groups(returns, groups)
    return returns - (sums - returns) / (counts - 1)


def grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """Advantages [N]: (return - mean) / std over the responses to a prompt (2402.03300, section 4.1.2).

    The arguments are those of `rloo`. Responses whose returns are all equal get advantage 0.
    """
    sums, counts = _of_groups(returns, groups)
    centred = returns - sums / counts
    variance = _of_groups(centred.square(), groups)[0] / (counts - 1)
    return centred / (variance.sqrt() + 1e-6)


def dr_grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """Advantages [N]: return - mean over the responses to a prompt (Dr. GRPO, 2503.20783, section 3.2).

    The arguments are those of `rloo`, of which it is (n - 1) / n for n responses to a prompt.
    """
    sums, counts = _of_groups(returns, groups)
    return returns - sums / counts


def _of_groups(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and size [N] of the group that each element belongs to."""
    same = (groups[:, None] == groups[None, :]).to(x.dtype)
    return same @ x, same.sum(-1)


def masked_mean(x: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Sum of x over True positions, divided by their number or by `denominator`; a scalar.

    With the number of response tokens of the global batch as the denominator, the results of micro-batches add up to
    the mean over that batch. Each row may have a denominator of its own, [B, 1].
    """
    if isinstance(denominator, Tensor):
        return (torch.where(mask, x, 0.0) / denominator).sum()
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if denominator is None else denominator)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x scaled to variance 1 over the True positions of all ranks, and 0 elsewhere; same shape as x.

    The mean over these positions becomes 0, or is kept where `shift_mean` is False. Every rank must call it.
    """
    x = torch.where(mask, x, 0.0)
    mean, variance = _moments(x, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    is_weight: Tensor | None = None,
    denominator: float | None = None,
    loss_denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss of PPO (1707.06347, eq. 7), the mean over response tokens.

    Args:
        logp: [B, T] of the policy, with gradient.
        old_logp: [B, T] of the policy before the step's updates.
        advantages: [B, T].
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: c, which bounds the gain from below by c * A where the advantage A is negative (1912.09729).
        is_weight: [B, T] of `ppo.methods.correction`, by which the loss of each token is multiplied.
        denominator: as in `masked_mean`.
        loss_denominator: the same of the loss alone, where its tokens are weighed otherwise than in the metrics.

    Returns:
        The loss, and without gradient: `clipfrac`, the share of tokens whose gradient is clipped away; `approx_kl`,
        the k3 estimate of KL(old || new) per token; `ratio_max_dev`, the largest |ratio - 1|. The denominator is that
        of all but the last, so these of micro-batches add up too.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio, adv = log_ratio.exp(), torch.where(mask, advantages, 0.0)
    plain, clipped = ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv
    gain = torch.minimum(plain, clipped)
    if dual_clip is not None:
        gain = torch.where(adv < 0, torch.maximum(gain, dual_clip * adv), gain)
    if is_weight is not None:
        gain = gain * torch.where(mask, is_weight, 0.0)
    with torch.no_grad():
        stats = {
            "clipfrac": masked_mean((clipped < plain).float(), mask, denominator),
            # k3 of KL(old || new), since the tokens are samples of the old policy
            "approx_kl": masked_mean(ratio - 1 - log_ratio, mask, denominator),
            "ratio_max_dev": (ratio - 1).abs().max(),
        }
    return -masked_mean(gain, mask, denominator if loss_denominator is None else loss_denominator), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, denominator: float | None = None
) -> tuple[Tensor, Tensor]:
    """Half the mean, over response tokens, of the larger of the plain and the clipped squared error of the critic.

    Args:
        values: [B, T] of the critic, with gradient.
        old_values: [B, T] before the step's updates.
        returns: [B, T], the targets.
        clip: how far from the old value a new one counts, in units of the reward; infinite for no clipping.
        denominator: as in `masked_mean`.

    Returns:
        The loss, and the share of tokens that are clipped, without gradient, with the same denominator.
    """
    values, old, target = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    near = old + (values - old).clamp(-clip, clip)
    plain, clipped = (values - target).square(), (near - target).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask, denominator)
    return loss, masked_mean((clipped > plain).float(), mask, denominator).detach()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), a scalar: 1 is perfect, 0 is no better than a constant.

    The variances are over the True positions of all ranks. Every rank must call it.
    """
    return 1 - _moments(returns - values, mask)[1] / _moments(returns, mask)[1].clamp(min=1e-8)


def clustered_se(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean of `values` [n] when those of one cluster are not independent.

    Its square is the cluster-robust variance of a mean (Liang and Zeger 1986), sum_g (sum_{i in g} (x_i - mean))^2 /
    n^2, times G / (G - 1) for G clusters. With clusters of one value it is the usual s / sqrt(n). The values of a lone
    cluster are taken as independent, since nothing is known of others.
    """
    n, names = len(values), set(clusters)
    if len(names) == 1:
        clusters, names = range(n), set(range(n))
    mean = math.fsum(values) / n
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    return math.sqrt(len(names) / max(1, len(names) - 1) * math.fsum(s * s for s in sums.values())) / n


class AdaptiveKL:
    """The coefficient of the KL penalty, under proportional control (Ziegler et al. 1909.08593, section 2.2).

    Args:
        coef: initial value.
        target: KL in nats per response (the sum over its tokens) that is aimed at; None keeps the coefficient fixed.
        horizon: responses over which the coefficient follows; a larger horizon is slower.
    """

    def __init__(self, coef: float, target: float | None, horizon: int):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl_per_response: float, n: int) -> None:
        """Adapt to `n` responses whose mean KL was `kl_per_response` nats."""
        if self.target is not None:
            error = min(0.2, max(-0.2, kl_per_response / self.target - 1))
            self.coef *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x over the True positions of all ranks."""
    count, total = _global(mask.sum(), torch.where(mask, x, 0.0).sum())
    mean = total / count
    (square,) = _global(torch.where(mask, x - mean, 0.0).square().sum())
    return mean, square / count


def _global(*values: Tensor) -> list[Tensor]:
    """Each scalar summed over all ranks, in float64, returned as float32."""
    stacked = torch.stack([v.double() for v in values])
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return list(stacked.float())
