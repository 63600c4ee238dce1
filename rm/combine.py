"""One reward from the rewards of an ensemble: pure functions of rewards [k, n] by k members of n conversations.

Members must first be brought to one scale. Bradley-Terry leaves the offset of each reward model free, so a minimum of
raw rewards is little more than the member with the lowest offset. `standardise` uses samples of the reference policy
(for PPO). `centre_by_prompt` works within each prompt (for best-of-n, where each prompt has a free offset too).

All combiners keep type and device and do not depend on the order of the members. For k = 1 they return the member's
rewards. They raise DataError on rewards that are not floats [k, n] with k >= 1, or that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from core.errors import DataError

Combiner = Callable[[Tensor], Tensor]
"""Standardised rewards [k, n] -> rewards [n]."""


def standardise(rewards: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(r_i - mean_i) / std_i [k, n].

    Args:
        mean, std: [k], of each member's rewards on samples of the reference policy.

    Raises:
        DataError: not one mean and one positive standard deviation per member.
    """
    _check(rewards)
    if len(mean) != len(rewards) or len(std) != len(rewards) or not all(s > 0 for s in std):
        raise DataError(f"{len(rewards)} members need a mean and a positive std each, not {mean} and {std}")
    columns = (torch.tensor(x, dtype=rewards.dtype, device=rewards.device)[:, None] for x in (list(mean), list(std)))
    return (rewards - next(columns)) / next(columns)


def centre_by_prompt(rewards: Tensor, prompts: Sequence[Hashable], std: Sequence[float]) -> Tensor:
    """(r_i - mean of r_i over the samples of the same prompt) / std_i [k, n].

    Args:
        prompts: [n], the prompt of each sample, for example its id.
        std: [k] of `within_prompt_std`, on calibration prompts rather than on those that are evaluated.

    Raises:
        DataError: another number of prompts or of standard deviations, or one that is not positive.
    """
    _check(rewards)
    return standardise(rewards - _prompt_means(rewards, prompts), [0.0] * len(rewards), std)


def within_prompt_std(rewards: Tensor, prompts: Sequence[Hashable]) -> list[float]:
    """Pooled standard deviation within prompts of each member [k].

    The square root of the squared deviations from the prompt's mean, summed, over n - (number of prompts).

    Raises:
        DataError: no prompt has two samples.
    """
    _check(rewards)
    free = rewards.shape[1] - len(set(prompts))
    if free < 1:
        raise DataError("no prompt has two samples, so no spread within prompts can be measured")
    squares = (rewards - _prompt_means(rewards, prompts)).double().square()
    return (squares.sum(1) / free).sqrt().tolist()


def mean(rewards: Tensor) -> Tensor:
    """(1/k) sum_i r_i: Coste et al. (2310.02743)."""
    _check(rewards)
    return rewards.mean(0)


def minimum(rewards: Tensor) -> Tensor:
    """WCO, worst-case optimisation, min_i r_i: Coste et al. (2310.02743)."""
    _check(rewards)
    return rewards.amin(0)


def uncertainty_weighted(rewards: Tensor, weight: float) -> Tensor:
    """UWO, uncertainty-weighted optimisation, mean - weight * (1/k) sum_i (r_i - mean)^2: Coste et al. (2310.02743).

    The variance is over k, as in the paper. The PPO part of their code divides by k - 1, with which the same weight is
    k / (k - 1) times as strong. The paper uses a weight of 0.5 for best-of-n and 0.1 for PPO.

    Raises:
        DataError: a negative or infinite weight.
    """
    _check(rewards)
    if not (weight >= 0 and math.isfinite(weight)):
        raise DataError(f"the weight of the variance must be 0 or more, not {weight}")
    return rewards.mean(0) - weight * rewards.var(0, correction=0)


def quantile(rewards: Tensor, q: float) -> Tensor:
    """The q-quantile over members, linear between neighbours: 0 is the minimum, 0.5 the median.

    Raises:
        DataError: q outside [0, 1].
    """
    _check(rewards)
    if not 0 <= q <= 1:
        raise DataError(f"a quantile must be between 0 and 1, not {q}")
    ordered = rewards.sort(0).values
    place = q * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low].lerp(ordered[high], place - low)


def soft_minimum(rewards: Tensor, beta: float) -> Tensor:
    """-beta log((1/k) sum_i exp(-r_i / beta)): the worst case over members within a KL ball (2606.09073).

    It goes from the mean (beta -> infinity) down to the minimum (beta -> 0).

    Raises:
        DataError: beta is not positive and finite.
    """
    _check(rewards)
    if not (beta > 0 and math.isfinite(beta)):
        raise DataError(f"beta must be positive, not {beta}")
    return -beta * (torch.logsumexp(-rewards / beta, dim=0) - math.log(len(rewards)))


PLAIN: dict[str, Combiner] = {"mean": mean, "min": minimum, "median": lambda rewards: quantile(rewards, 0.5)}
"""Combiners by name."""
WITH_NUMBER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uwo": uncertainty_weighted,
    "quantile": quantile,
    "soft_min": soft_minimum,
}
"""Combiners that take a number, by name."""
KNOWN = "mean, min, median, uwo:WEIGHT, quantile:Q, soft_min:BETA"


def combiner(text: str) -> Combiner:
    """The combiner that `text` names, for example `mean` or `uwo:0.5`.

    Raises:
        DataError: an unknown name, or a number that the combiner refuses.
    """
    name, _, number = text.partition(":")
    if name in PLAIN and not number:
        return PLAIN[name]
    try:
        value = float(number)
        function = WITH_NUMBER[name]
    except (KeyError, ValueError):
        raise DataError(f"no combiner {text!r}: known are {KNOWN}") from None
    function(torch.zeros(1, 1), value)  # a number that it refuses fails here, not at the first rewards
    return lambda rewards: function(rewards, value)


def proxy_reward(rewards: Tensor, units: Sequence[tuple[float, float]], rule: str | None) -> Tensor:
    """The rewards [n] that are optimised, from the raw rewards [k, n] of the members.

    Args:
        units: (mean, std) of each member's rewards on samples of the reference policy.
        rule: of `combiner`, applied to the standardised rewards; None for a single member, which keeps its own units.
    """
    if rule is None:
        return rewards[0]
    means, stds = zip(*units, strict=True)
    return combiner(rule)(standardise(rewards, means, stds))


def proxy_units(units: Sequence[tuple[float, float]], rule: str | None) -> tuple[float, float]:
    """Mean and standard deviation to show `proxy_reward` in: a combination is in standard deviations already."""
    return units[0] if rule is None else (0.0, 1.0)


def _prompt_means(rewards: Tensor, prompts: Sequence[Hashable]) -> Tensor:
    """[k, n]: for each sample, the mean over the samples of its prompt."""
    if len(prompts) != rewards.shape[1]:
        raise DataError(f"{rewards.shape[1]} samples need one prompt each, not {len(prompts)} prompts")
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([number[p] for p in prompts], dtype=torch.long, device=rewards.device)
    sums = rewards.new_zeros(len(rewards), len(number)).index_add(1, group, rewards)
    counts = torch.bincount(group, minlength=len(number))
    return (sums / counts)[:, group]


def _check(rewards: Tensor) -> None:
    if rewards.ndim != 2 or not len(rewards) or not rewards.is_floating_point():
        raise DataError(f"rewards of an ensemble must be floats [members, conversations], not {list(rewards.shape)}")
    if bad := (~rewards.isfinite()).nonzero().tolist():
        raise DataError(f"{len(bad)} rewards of the ensemble are not finite; the first is [member, row] {bad[0]}")
