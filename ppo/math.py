"""The mathematics of PPO: pure torch. B responses, T tokens, V vocabulary.

Masks are True on response tokens, EOS included.

Masked positions may hold anything, NaN too: they change neither values nor gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

MAX_LOG_RATIO = 20.0


def logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Float32 log-probabilities [B, T] of `tokens` under softmax(logits [B, T, V] / temperature)."""
    return (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log pi - log pi_0 of tokens sampled from pi: unbiased for KL(pi || pi_0), may be negative (Schulman 2020)."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log pi - log pi_0)^2 / 2: biased, small variance near pi_0."""
    return 0.5 * (logp - ref_logp).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """pi_0/pi - 1 - log(pi_0/pi): unbiased and never negative."""
    log_ratio = ref_logp - logp
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 - log_ratio


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || pi_0) over the vocabulary, in nats; last dimension V is summed out."""
    logp, ref = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref)).sum(-1)


def kl_loss(logp: Tensor, ref_logp: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """KL(pi || pi_0) as a term of the loss, a mean over tokens; inputs [B, T], tokens sampled from pi.

    Its value is that of k3; its gradient is that of k2, (log pi - log pi_0) d log pi, whose expectation is the gradient
    of the KL. That of k3 itself is the gradient of the reverse KL.
    """
    logp, ref_logp = torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0)
    k2, k3 = kl_k2(logp, ref_logp), kl_k3(logp, ref_logp).detach()
    return masked_mean(k2 - k2.detach() + k3, mask, denominator)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """-coef * kl [B, T] on every response token, plus the score [B] on the last one (Ziegler et al. 1909.08593)."""
    rewards = torch.where(mask, -coef * kl, 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * columns).argmax(-1)
    at_end = (columns == last[:, None]) & mask
    return rewards + torch.where(at_end, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438, eq. 16): advantages and returns = advantages + values, [B, T].

    A row's response is one run of True; the value after its last token is 0.
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
    """sum_k gamma^k r_{t+k} [B, T]: what GAE gives with lambda = 1 and no critic."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def rloo(returns: Tensor, groups: Tensor) -> Tensor:
    """Each response's return less the mean return of the others to its prompt (2402.14740, eq. 7).

    returns: [N] of whole responses; groups: [N], equal for responses to one prompt, at least two of each.
    """
    sums, counts = _of_groups(returns, groups)
    return returns - (sums - returns) / (counts - 1)


def grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """(return - mean) / std over the responses to a prompt (2402.03300, section 4.1.2); arguments as in `rloo`.

    A group whose returns are all equal has advantage 0.
    """
    sums, counts = _of_groups(returns, groups)
    centred = returns - sums / counts
    variance = _of_groups(centred.square(), groups)[0] / (counts - 1)
    return centred / (variance.sqrt() + 1e-6)


def _of_groups(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and size [N] of the group that each element belongs to."""
    same = (groups[:, None] == groups[None, :]).to(x.dtype)
    return same @ x, same.sum(-1)


def masked_mean(x: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """Sum of x over True positions, over their number or over `denominator` (the tokens of a global batch)."""
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if denominator is None else denominator)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x with variance 1 (and mean 0, unless shift_mean is False) over the True positions of all ranks; 0 elsewhere."""
    x = torch.where(mask, x, 0.0)
    count, total = _global(mask.sum(), x.sum())
    mean = total / count
    (square,) = _global(torch.where(mask, x - mean, 0.0).square().sum())
    white = (x - mean) * torch.rsqrt(square / count + 1e-8)
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (1707.06347, eq. 7), a mean over tokens; all inputs [B, T].

    Args:
        dual_clip: lower bound c * A for negative advantages (1912.09729).
        is_weight: truncated importance weights actor / sampler, on the loss.
        denominator: tokens of the global optimiser batch; micro-batch losses then add up to its mean.
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
            "clipfrac": masked_mean((clipped < plain).float(), mask),
            # k3 of KL(old || new): the tokens are samples of old
            "approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
            "ratio_max_dev": (ratio - 1).abs().max(),
        }
    return -masked_mean(gain, mask, denominator), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, denominator: float | None = None
) -> tuple[Tensor, Tensor]:
    """Half the mean of the larger of plain and clipped squared error, and the share clipped; inputs [B, T].

    `clip` may be infinite: then nothing is clipped.
    """
    values, old, target = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    near = old + (values - old).clamp(-clip, clip)
    plain, clipped = (values - target).square(), (near - target).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask, denominator)
    return loss, masked_mean((clipped > plain).float(), mask).detach()


def importance_weight(logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """min(pi_actor / pi_sampler, cap), without gradient: corrects for the sampler's rounding."""
    return (logp - sampler_logp).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over True positions: 1 is perfect, 0 no better than a constant."""
    target, error = returns[mask], (returns - values)[mask]
    return 1 - error.var(correction=0) / target.var(correction=0).clamp(min=1e-8)


class AdaptiveKL:
    """The KL coefficient; proportional control as in Ziegler et al. (1909.08593), fixed when `target` is None.

    `target` is in nats per response (the sum over its tokens).
    """

    def __init__(self, coef: float, target: float | None, horizon: int):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl_per_response: float, n: int) -> None:
        """After `n` responses whose mean KL was `kl_per_response`."""
        if self.target is not None:
            error = min(0.2, max(-0.2, kl_per_response / self.target - 1))
            self.coef *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


def _global(*values: Tensor) -> list[Tensor]:
    """Sums over all ranks."""
    stacked = torch.stack([v.double() for v in values])
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return list(stacked.float())
