"""One PPO update: advantages of a rollout, then epochs of minibatches over it. Uses neither vLLM nor files."""

from __future__ import annotations

import math
import random

import torch

from core.config import Ppo
from core.data.streams import stream_seed
from core.errors import DataError
from core.training import distributed
from core.training.engine import Engine
from ppo.math import (
    explained_variance,
    gae,
    grpo,
    kl_k1,
    kl_loss,
    masked_whiten,
    policy_loss,
    reward_to_go,
    rloo,
    shaped_rewards,
    value_loss,
)
from ppo.policy import scatter
from ppo.records import Micro
from ppo.rewards import RewardScale, final_rewards

FIRST_RATIO = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far from 1 the ratio of an unchanged policy may be: the same weights on the same rows in the same shape."""


class Learner:
    """The engines that are trained, and the objective of PPO.

    Every rank must make the same calls, each with its own part of the rollout.

    Args:
        critic: None for the estimators that have none.
        scale: normalises the proxy's rewards.
        seed: of the order of the minibatches.
    """

    def __init__(self, ppo: Ppo, actor: Engine, critic: Engine | None, scale: RewardScale, seed: int):
        self.ppo, self.actor, self.critic, self.scale, self.seed = ppo, actor, critic, scale, seed

    def values(self, micro: Micro) -> torch.Tensor:
        """Critic values [B, L-1] in units of the normalised reward: at column t the value before token t+1.

        0 outside responses.
        """
        assert self.critic is not None, "estimators without a critic have no values"
        values = self.critic(micro.input_ids, micro.attention_mask, read=micro.reads, frozen=micro.frozen)[0]
        if self.ppo.critic_head == "reward":  # in the proxy's units, so brought to those of the rewards
            values = self.scale.normalise(values)
        return scatter(values, micro.is_response)

    def advantages(self, micros: list[Micro], kl_coef: float) -> dict[str, float]:
        """Fill in advantages, and with a critic returns, of this rank's micro-batches.

        Args:
            kl_coef: of the penalty in the reward; not used where `ppo.kl.where` is loss.

        Returns:
            `reward_mean`, over the responses of all ranks, and with a critic `explained_variance`, on this rank.
        """
        ppo, stats = self.ppo, {}
        coef = kl_coef if ppo.kl.where == "reward" else 0.0
        finals, rewards = [], []
        for m in micros:
            final = final_rewards(ppo.reward, self.scale.normalise(m.proxy), m.finished, m.is_response.sum(-1))
            finals.append(final)
            rewards.append(shaped_rewards(final, kl_k1(m.logprobs, m.ref_logprobs), m.is_response, coef))
        if ppo.estimator in ("rloo", "grpo"):
            whole = torch.cat([r.sum(-1) for r in rewards])
            compare = rloo if ppo.estimator == "rloo" else grpo
            of_rows = compare(whole, torch.cat([m.group for m in micros])).split([len(m.group) for m in micros])
            for m, row in zip(micros, of_rows, strict=True):
                m.advantages = torch.where(m.is_response, row[:, None], 0.0)
        else:
            for m, reward in zip(micros, rewards, strict=True):
                if self.critic:
                    m.advantages, m.returns = gae(reward, m.values, m.is_response, ppo.gamma, ppo.lam)
                else:
                    m.advantages = reward_to_go(reward, m.is_response, ppo.gamma)
            if self.critic:
                stats["explained_variance"] = _explained(micros)
            if ppo.whiten_advantages:
                _whiten(micros)
        rows, total = distributed.global_sum(sum(map(len, finals)), sum(float(f.double().sum()) for f in finals))
        return stats | {"reward_mean": total / rows}

    def update(self, micros: list[Micro], step: int, kl_coef: float) -> dict[str, float]:
        """Train actor and critic: `ppo.epochs` epochs of `ppo.minibatches` minibatches over the rollout.

        Args:
            step: of PPO, from 1; the actor rests for the first `ppo.critic_warmup_steps`.
            kl_coef: of the penalty in the loss; not used where `ppo.kl.where` is reward.

        Returns:
            Metrics, as means over all updates and ranks.

        Raises:
            DataError: on the first minibatch, before anything is trained, the ratio is not 1.
        """
        ppo, meter = self.ppo, _Meter()
        train_policy = step > ppo.critic_warmup_steps
        for epoch in range(ppo.epochs):
            for number, minibatch in enumerate(self._minibatches(micros, step, epoch)):
                part = self._minibatch_passes(minibatch, kl_coef, train_policy)
                if train_policy and epoch == number == 0:
                    self._check_first(part, step)
                meter.merge(part, len(minibatch))
                if train_policy:
                    meter.norms("actor_grad_norm", self.actor.grad_norm)
                if self.critic:
                    meter.norms("critic_grad_norm", self.critic.grad_norm)
                if train_policy and ppo.kl.stop:
                    passes = len(minibatch) * distributed.world_size()
                    if distributed.global_sum(part.sums["approx_kl"])[0] / passes > ppo.kl.stop:
                        train_policy = False
            if not train_policy and not self.critic:
                break
        return meter.means()

    def _minibatches(self, micros: list[Micro], step: int, epoch: int) -> list[list[Micro]]:
        """Equally many micro-batches each, in the same order on all ranks.

        Micro-batches stay whole, so that their shapes, and so the ratios, are those of the rollout.
        """
        rng = random.Random(stream_seed(self.seed, "ppo", "minibatches", step, epoch))
        order, size = rng.sample(micros, len(micros)), len(micros) // self.ppo.minibatches
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _minibatch_passes(self, minibatch: list[Micro], kl_coef: float, train_policy: bool) -> _Meter:
        """Forward and backward passes on one minibatch, at the end of which the engines step their optimisers."""
        tokens = distributed.global_sum(sum(int(m.is_response.sum()) for m in minibatch))[0]
        meter = _Meter()
        for m in minibatch:
            if train_policy:
                meter.add(**self._policy_pass(m, tokens, kl_coef))
            if self.critic:
                meter.add(**self._critic_pass(m, tokens))
        return meter

    def _policy_pass(self, m: Micro, tokens: float, kl_coef: float) -> dict[str, torch.Tensor]:
        """One pass of the actor; `tokens` are the response tokens of the minibatch on all ranks."""
        ppo = self.ppo
        logps, entropy = self.actor(
            m.input_ids, m.attention_mask, m.is_response, with_entropy=ppo.entropy_coef > 0, frozen=m.frozen
        )  # fmt: skip
        loss, stats = policy_loss(
            logps, m.logprobs, m.advantages, m.is_response, ppo.clip.low, ppo.clip.high,
            dual_clip=ppo.clip.dual, is_weight=m.is_weight, denominator=tokens,
        )  # fmt: skip
        total = loss
        if entropy is not None:
            total = total - ppo.entropy_coef * entropy.sum() / tokens
        if ppo.kl.where == "loss" and kl_coef:
            total = total + kl_coef * kl_loss(logps, m.ref_logprobs, m.is_response, tokens)
        self.actor.backward(total * self._scale(self.actor))
        self.actor.step()
        return {"policy_loss": loss, **stats}

    def _critic_pass(self, m: Micro, tokens: float) -> dict[str, torch.Tensor]:
        """One pass of the critic."""
        assert self.critic is not None
        loss, clipfrac = value_loss(
            self.values(m), m.values, m.returns, m.is_response, self.ppo.clip.value or math.inf, denominator=tokens
        )
        self.critic.backward(loss * self._scale(self.critic))
        self.critic.step()
        return {"value_loss": loss, "value_clipfrac": clipfrac}

    @staticmethod
    def _scale(engine: Engine) -> int:
        # DeepSpeed averages over ranks and accumulated passes; these losses add up to the mean over all tokens.
        return distributed.world_size() * engine.accumulation

    def _check_first(self, meter: _Meter, step: int) -> None:
        limit = FIRST_RATIO[next(self.actor.module.parameters()).dtype]
        if meter.largest["ratio_max_dev"] > limit:
            raise DataError(
                f"ppo step {step}: before any update the ratio to the rollout's policy differs from 1 by "
                f"{meter.largest['ratio_max_dev']:.2g} (limit {limit:g}). Is there dropout, or a kernel that computes "
                "differently in training mode? Set policy.attention=eager"
            )


class _Meter:
    """Sums over micro-batches, which become means over updates and ranks at the end."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self._passes: dict[str, int] = {}
        self._norms: dict[str, list[float]] = {}

    def add(self, **values: torch.Tensor) -> None:
        """Count one pass."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value.detach())
            self.largest[key] = max(self.largest.get(key, -float("inf")), float(value.detach()))

    def merge(self, minibatch: _Meter, size: int) -> None:
        """Count the passes of a minibatch of `size` micro-batches."""
        for key, value in minibatch.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.largest[key] = max(self.largest.get(key, -float("inf")), minibatch.largest[key])
            self._passes[key] = self._passes.get(key, 0) + (1 if key.endswith("loss") else size)

    def norms(self, key: str, value: float) -> None:
        """Count the gradient norm of one update; NaN is left out."""
        if not math.isnan(value):
            self._norms.setdefault(key, []).append(value)

    def means(self) -> dict[str, float]:
        # A loss of a micro-batch is its share of the mean over all tokens: shares add up over micro-batches and ranks.
        totals = dict(zip(self.sums, distributed.global_sum(*self.sums.values()), strict=True)) if self.sums else {}
        ranks = {k: 1 if k.endswith("loss") else distributed.world_size() for k in totals}
        means = {k: t / (self._passes[k] * ranks[k]) for k, t in totals.items()}
        return means | {k: sum(v) / len(v) for k, v in self._norms.items()}


def _explained(micros: list[Micro]) -> float:
    flat = lambda name: torch.cat([getattr(m, name)[m.is_response] for m in micros])  # noqa: E731
    values, returns = flat("values"), flat("returns")
    return float(explained_variance(values, returns, torch.ones_like(values, dtype=torch.bool)))


def _whiten(micros: list[Micro]) -> None:
    """Whiten the advantages over the response tokens of all micro-batches and ranks."""
    flat = torch.cat([m.advantages[m.is_response] for m in micros])
    white = masked_whiten(flat, torch.ones_like(flat, dtype=torch.bool))
    for m, part in zip(micros, white.split([int(m.is_response.sum()) for m in micros]), strict=True):
        m.advantages = scatter(part, m.is_response)
