"""From the proxy's raw reward of a response to the reward that PPO optimises: scale, shape, clip and penalties."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import Reward
from core.training import distributed
from ppo.methods.objective import overlong_penalty


class RewardScale:
    """Normalises raw rewards to mean 0 and standard deviation 1, as `ppo.reward.normalise` says.

    Args:
        mean, std: of the proxy's rewards on samples of the reference policy.

    Attributes:
        mean, std: what is subtracted from raw rewards, and what they are divided by; equal on all ranks.
    """

    def __init__(self, cfg: Reward, mean: float, std: float):
        self.cfg = cfg
        self._fixed = (mean, std) if cfg.normalise == "calibration" else (0.0, 1.0)
        self._count, self._mean, self._squares = 0.0, 0.0, 0.0

    def update(self, raw: Sequence[Tensor]) -> None:
        """Take the raw rewards of this rank's rollout into account, a tensor per micro-batch. Every rank must call it.

        Changes mean and standard deviation only with `normalise: running`, which combines the moments of all rollouts
        so far (Chan et al. 1979, eq. 2.1).
        """
        if self.cfg.normalise != "running":
            return
        values = torch.cat([r.double().flatten() for r in raw])
        count, total = distributed.global_sum(len(values), float(values.sum()))
        mean = total / count
        (squares,) = distributed.global_sum(float((values - mean).square().sum()))
        both, difference = self._count + count, mean - self._mean
        self._squares += squares + difference**2 * self._count * count / both
        self._mean += difference * count / both
        self._count = both

    @property
    def mean(self) -> float:
        return self._mean if self.cfg.normalise == "running" else self._fixed[0]

    @property
    def std(self) -> float:
        if self.cfg.normalise != "running":
            return self._fixed[1]
        return math.sqrt(self._squares / max(1.0, self._count - 1)) or 1.0

    def normalise(self, raw: Tensor) -> Tensor:
        """(raw - mean) / std, elementwise."""
        return (raw - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to continue."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._count, self._mean, self._squares = state["count"], state["mean"], state["squares"]


def final_rewards(
    cfg: Reward, normalised: Tensor, finished: Tensor, tokens: Tensor, longest: int | None = None
) -> Tensor:
    """The rewards [B] that PPO optimises: shaped, clipped, then less the penalties.

    Args:
        normalised: [B], of `RewardScale.normalise`.
        finished: [B] bool, False where max_new_tokens cut the response off.
        tokens: [B], the length of each response in tokens.
        longest: the most tokens that a response can have, for `overlong_buffer`.
    """
    rewards = shape(cfg.shape, normalised - cfg.center) if cfg.shape != "none" else normalised
    if cfg.clip:
        rewards = rewards.clamp(-cfg.clip, cfg.clip)
    rewards = rewards - cfg.missing_eos_penalty * (~finished).float() - cfg.length_penalty * tokens
    if cfg.overlong_buffer:
        assert longest is not None, "the length that the buffer ends at"
        rewards = rewards + cfg.overlong_weight * overlong_penalty(tokens, longest, cfg.overlong_buffer)
    return rewards


def shape(kind: str, centred: Tensor) -> Tensor:
    """Saturating rewards, elementwise: `par`, a sigmoid (2502.18770, eq. 5), or `log_sigmoid` (2402.00742, eq. 3)."""
    return torch.sigmoid(centred) if kind == "par" else F.logsigmoid(centred)
