"""The proxy reward of rollouts: a reward model sharded over the ranks, or the same one behind `grm rm-serve`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.data.chat import Message
from core.errors import ArtefactError
from core.training import distributed
from core.training.engine import Engine
from rm.combine import proxy_reward, proxy_units
from rm.model import RewardModel
from rm.score import score
from rm.serving.client import RemoteRewardModel

Answered = Sequence[Sequence[Message]]


class LocalProxy:
    """All ranks score together: each gives as many conversations, and the work is divided by tokens.

    Args:
        members: engines of the reward models; more than one are an ensemble.
        rule: how their rewards are combined (`rm.combine.combiner`), None for a single one.
    """

    def __init__(self, members: Sequence[Engine], rule: str | None):
        self._members, self._rule = members, rule
        self._units = [(m.module.mean, m.module.std) for m in members]
        self.mean, self.std = proxy_units(self._units, rule)
        proxy_reward(torch.zeros(len(members), 1), self._units, rule)  # an unknown rule is told before any sampling

    def score(self, answered: Answered) -> Tensor:
        """Raw rewards [n] of this rank's conversations."""
        everyones = distributed.gather_rows(list(answered))
        rewards = [
            score(
                member, member.module.tokenizer, everyones, share=member.module.shares_prompts, together=True,
                device=distributed.device(),
            )
            for member in self._members
        ]  # fmt: skip
        combined = proxy_reward(torch.stack(rewards), self._units, self._rule)
        return combined[distributed.rank() * len(answered) :][: len(answered)]


class RemoteProxy:
    """Each rank asks the server for its own rewards; the server batches what arrives together.

    Args:
        expected: what the run trained as `ppo.proxy`; evaluation measures that one.

    Raises:
        ArtefactError: the server has another model, or an ensemble.
        rm.serving.client.RemoteError: no server there.
    """

    def __init__(self, url: str, expected: RewardModel):
        self._remote = RemoteRewardModel(url, tokenizer=expected.tokenizer.fingerprint)
        served, trained = (self._remote.mean, self._remote.std), (expected.mean, expected.std)
        if served != trained:
            raise ArtefactError(
                f"ppo.reward_server {url} serves a model whose rewards have mean and std {served}; those of ppo.proxy "
                f"are {trained}: serve the folder of ppo.proxy, without --normalise"
            )
        self.mean, self.std = trained

    def score(self, answered: Answered) -> Tensor:
        """Raw rewards [n] of this rank's conversations."""
        return self._remote.score(answered)
