"""What PPO optimises: the reward of the reward models, or a weighted sum of it and of rewards of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core.config import Reward
from core.data.rows import ResponseRow
from ppo.forward import Wide
from ppo.proxy import LocalProxy, RemoteProxy
from ppo.reward.own import OwnReward

PART = "reward_"
"""Begins the columns of what a reward is the sum of, in tables and metrics."""


class MixedReward:
    """Reward models alone keep their units. With own rewards, a reward is

        model_weight * (r - mean) / std + function_weight * f + url_weight * u,

    where mean and std are of the reward models' rewards r on samples of the reference: Bradley-Terry leaves their
    offset and scale free, so a weight would mean nothing without that.

    Args:
        proxy: the reward models; None where their weight is 0.
        own: of `ppo.reward.own.own_rewards`.

    Attributes:
        mean, std: of the rewards on samples of the reference; 0 and 1 of a sum, as of ensembles.
    """

    def __init__(self, cfg: Reward, proxy: LocalProxy | RemoteProxy | None, own: Mapping[str, OwnReward]):
        self._cfg, self._proxy, self._own = cfg, proxy, own
        self.mean, self.std = (0.0, 1.0) if own or proxy is None else (proxy.mean, proxy.std)

    def score(self, rows: Sequence[ResponseRow], batches: Sequence[Wide] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards [n] of this rank's responses, and what they are the sum of; every rank must give equally many.

        Args:
            rows, batches: as of `LocalProxy.score`; own rewards read `prompt_id` and `metadata` too.

        Returns:
            The rewards, and with own rewards the parts before their weights: `model` (standardised), `function`, `url`.

        Raises:
            DataError: a reward that is no finite number.
            ArtefactError: a server that does not answer.
        """
        if not self._own:
            assert self._proxy is not None, "the configuration has a reward"
            return self._proxy.score(rows, batches), {}
        parts = {name: own.score(rows) for name, own in self._own.items()}
        if self._proxy is not None:
            parts["model"] = (self._proxy.score(rows, batches) - self._proxy.mean) / self._proxy.std
        weights = {"model": self._cfg.model_weight, "function": self._cfg.function_weight, "url": self._cfg.url_weight}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)
        return total, parts
