"""The proxy reward of rollouts: a reward model sharded over the ranks, or the same one behind `grm rm-serve`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipelines import engine
from pipelines.artefacts import ArtefactError
from pipelines.data import Message
from rm.model import RewardModel
from rm.remote import RemoteRewardModel
from rm.score import score

Answered = Sequence[Sequence[Message]]


class LocalProxy:
    """All ranks score together: each gives as many conversations, and the work is divided by tokens."""

    def __init__(self, sharded: engine.Engine):
        self._engine = sharded
        self.normalise = sharded.module.normalise

    def score(self, answered: Answered) -> Tensor:
        """Raw rewards [n] of this rank's conversations."""
        everyones, model = engine.gather_rows(list(answered)), self._engine.module
        rewards = score(
            self._engine, model.tokenizer, everyones, share=model.shares_prompts, together=True, device=engine.device()
        )
        return rewards[engine.rank() * len(answered) :][: len(answered)]


class RemoteProxy:
    """Each rank asks the server for its own rewards; the server batches what arrives together.

    Args:
        expected: what the run trained as `ppo.proxy`; evaluation measures that one.

    Raises:
        ArtefactError: the server has another model, or an ensemble.
        rm.remote.RemoteError: no server there.
    """

    def __init__(self, url: str, expected: RewardModel):
        self._remote = RemoteRewardModel(url, tokenizer=expected.tokenizer.fingerprint)
        served, trained = (self._remote.mean, self._remote.std), (expected.mean, expected.std)
        if served != trained:
            raise ArtefactError(
                f"ppo.reward_server {url} serves a model whose rewards have mean and std {served}; those of ppo.proxy "
                f"are {trained}: serve the folder of ppo.proxy, without --normalise"
            )
        self.normalise = expected.normalise

    def score(self, answered: Answered) -> Tensor:
        """Raw rewards [n] of this rank's conversations."""
        return self._remote.score(answered)
