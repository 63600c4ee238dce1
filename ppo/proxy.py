"""The proxy reward of rollouts: reward models held by the ranks, or the same one behind `grm rm-serve`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.data.rows import ResponseRow
from core.errors import ArtefactError
from core.models.layers import states_at
from core.training import distributed
from core.training.engine import Engine
from ppo.forward import Wide
from rm.combine import proxy_reward, proxy_units
from rm.ensemble import EngineMember
from rm.model import RewardModel
from rm.score import score_tokens
from rm.serving.client import RemoteRewardModel


class LocalProxy:
    """Reward models under engines. All ranks score together, and the work is divided by tokens.

    Args:
        members: engines of the reward models; several are an ensemble.
        rule: how their rewards are combined (`rm.combine.combiner`); None for a single reward model.
        continuing: how many of the policy's lowest layers each member has and need not run, since their states are
            given, and it reads just the tokens that were sampled; 0 for a member that runs whole; None for all whole.

    Attributes:
        mean, std: of the proxy's rewards on samples of the reference policy.

    Raises:
        DataError: an unknown rule.
    """

    def __init__(
        self, members: Sequence[Engine | EngineMember], rule: str | None, continuing: Sequence[int] | None = None
    ):
        self._members, self._rule, self._continuing = members, rule, continuing or [0] * len(members)
        self._units = [(m.module.mean, m.module.std) for m in members]
        self.mean, self.std = proxy_units(self._units, rule)
        proxy_reward(torch.zeros(len(members), 1), self._units, rule)  # an unknown rule fails here, not after sampling

    def score(self, rows: Sequence[ResponseRow], batches: Sequence[Wide] = ()) -> Tensor:
        """Raw rewards [n] of this rank's responses, float32 on the CPU; every rank must give equally many.

        They may be NaN or infinite: `ppo.guard` looks at them.

        Args:
            rows: with the tokens that were sampled, which the reward models read as they are (`rm.reading`).
            batches: the same responses with the states of the shared frozen layers, equally many on every rank.
        """
        shared = bool(batches) and batches[0].frozen is not None
        everyones = [] if shared and all(self._continuing) else distributed.gather_rows(list(rows))
        rewards = []
        for member, depth in zip(self._members, self._continuing, strict=True):
            if shared and depth:
                rewards.append(_from_states(member, batches, depth))
                continue
            model = member.module
            reader = model.reader
            found = score_tokens(
                member, model.tokenizer, [reader.row(row) for row in everyones], limits=model.limits,
                together=True, finite=False, device=distributed.device(),
            )  # fmt: skip
            rewards.append(found[distributed.rank() * len(rows) :][: len(rows)])
        members = torch.stack(rewards)
        bad = ~members.isfinite().all(0)
        return proxy_reward(members.masked_fill(bad, 0.0), self._units, self._rule).masked_fill(bad, torch.nan)


@torch.no_grad()
def _from_states(member: Engine | EngineMember, batches: Sequence[Wide], depth: int) -> Tensor:
    """Raw rewards [n] of the rows of `batches`, from the states of the lowest layers; by number of the response.

    Equal rows get one reward: `grpo` divides by the spread of a prompt's rewards, which must not be mere rounding.
    """
    rewards = torch.zeros(sum(len(batch.rows) for batch in batches))
    first: dict[bytes, int] = {}
    for batch in batches:
        numbers = batch.rows.tolist()
        frozen = states_at(batch.frozen, depth)
        rewards[numbers] = member(batch.input_ids, batch.attention_mask, frozen=frozen)[0].float().cpu()
        for number, ids, length in zip(numbers, batch.input_ids.cpu(), batch.attention_mask.sum(-1), strict=True):
            same = first.setdefault(ids[: int(length)].numpy().tobytes(), number)
            rewards[number] = rewards[same]
    return rewards


class RemoteProxy:
    """A reward model behind `grm rm-serve`. Each rank requests its own rewards, and the server batches the requests.

    Args:
        url: http://host:port of the server.
        expected: the model that this run trained as `ppo.proxy`: the one that stage `eval` measures.

    Attributes:
        mean, std: of the rewards on samples of the reference policy.

    Raises:
        ArtefactError: the server has another model, reads other tokens, or has an ensemble.
        rm.serving.client.RemoteError: no server answers at `url`.
    """

    def __init__(self, url: str, expected: RewardModel):
        self._remote = RemoteRewardModel(url, tokenizer=expected.tokenizer.fingerprint)
        served, trained = (self._remote.mean, self._remote.std), (expected.mean, expected.std)
        if served != trained:
            raise ArtefactError(
                f"ppo.reward_server {url} serves a model whose rewards have mean and std {served}; those of ppo.proxy "
                f"are {trained}: serve the folder of ppo.proxy, without --normalise"
            )
        reads = self._remote.about.get("reads", expected.reads)  # of version 0.1, which `score` refuses with what to do
        if reads != expected.reads:
            raise ArtefactError(
                f"ppo.reward_server {url} reads {reads} (docs/reward-models.md); ppo.proxy reads {expected.reads}: "
                f"serve it with --reads {expected.reads}, or without --reads"
            )
        self.mean, self.std = trained

    def score(self, rows: Sequence[ResponseRow], batches: Sequence[Wide] = ()) -> Tensor:
        """As `LocalProxy.score`; the tokens that were sampled go to the server."""
        return self._remote.score_rows(rows)
