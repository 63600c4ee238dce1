"""One PPO update: advantages of a rollout, then epochs of minibatches over it. Uses neither vLLM nor files."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch

from core.config import Ppo
from core.data.streams import stream_seed
from core.errors import DataError
from core.models.layers import states_at
from core.training import distributed
from core.training.distributed import check_finite
from core.training.engine import Engine
from ppo.forward import Wide
from ppo.guard import ADVICE
from ppo.math import (
    dr_grpo,
    explained_variance,
    gae,
    grpo,
    kl_k1,
    kl_loss,
    masked_mean,
    masked_whiten,
    policy_loss,
    reward_to_go,
    rloo,
    shaped_rewards,
    value_loss,
)
from ppo.methods.objective import cispo_loss, gspo_loss, length_adaptive_lambda, loss_denominator
from ppo.policy import scatter
from ppo.records import Micro
from ppo.rewards import RewardScale, final_rewards

FIRST_RATIO = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far from 1 the ratio of an unchanged policy may be: the same weights on the same rows in the same shape."""
COMPARING = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}
"""Estimators that compare the responses to a prompt."""
OBJECTIVES: dict[str, Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]] = {
    "ppo": policy_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
}
OF_TOKENS = ("approx_kl", "clipfrac", "value_clipfrac")
"""Metrics that are means over tokens."""


class Learner:
    """The engines that are trained, and the objective of PPO.

    Every rank must make the same calls, each with its own part of the rollout.

    Args:
        critic: None for the estimators that have none.
        scale: normalises the proxy's rewards.
        seed: of the order of the minibatches.
        longest: the most tokens that a response can have, for the methods that depend on it.

    Attributes:
        scale_before: state of the scale before the last `advantages`.
        minibatch: the last one of `update`.
    """

    def __init__(
        self, ppo: Ppo, actor: Engine, critic: Engine | None, scale: RewardScale, seed: int, longest: int | None = None
    ):
        self.ppo, self.actor, self.critic, self.scale, self.seed = ppo, actor, critic, scale, seed
        self.scale_before, self.minibatch = scale.state_dict(), list[Micro]()
        self.longest = longest

    def critic_outputs(self, micro: Micro | Wide) -> torch.Tensor:
        """The critic's outputs [B, L-1] in units of its head: at column t the one before token t+1.

        0 outside responses.
        """
        assert self.critic is not None, "estimators without a critic have no values"
        frozen = states_at(micro.frozen, self.critic.continues)
        outputs = self.critic(micro.input_ids, micro.attention_mask, read=micro.reads, frozen=frozen)[0]
        return scatter(outputs, micro.is_response)

    def _values(self, micro: Micro, outputs: torch.Tensor) -> torch.Tensor:
        """Values [B, L-1] in units of the normalised reward, by the scale as it is now."""
        if self.ppo.critic_head == "reward":  # in the proxy's units
            return torch.where(micro.is_response, self.scale.normalise(outputs), 0.0)
        return outputs

    def advantages(self, micros: list[Micro], kl_coef: float) -> dict[str, float]:
        """Fill in advantages, and with a critic values and returns, of this rank's micro-batches.

        The scale of the rewards is updated first, so that rewards and values of a step have one scale.

        Args:
            kl_coef: of the penalty in the reward; not used where `ppo.kl.where` is loss.

        Returns:
            `reward_mean`, over the responses of all ranks, and with a critic `explained_variance`, over all tokens.
        """
        ppo, stats = self.ppo, {}
        self.scale_before = self.scale.state_dict()
        self.scale.update([m.proxy for m in micros])
        coef = kl_coef if ppo.kl.where == "reward" else 0.0
        finals, rewards = [], []
        for m in micros:
            normalised, tokens = self.scale.normalise(m.proxy), m.is_response.sum(-1)
            final = final_rewards(ppo.reward, normalised, m.finished, tokens, self.longest)
            m.reward = final
            finals.append(final)
            rewards.append(shaped_rewards(final, kl_k1(m.logprobs, m.ref_logprobs), m.is_response, coef))
        if compare := COMPARING.get(ppo.estimator):
            whole = torch.cat([r.sum(-1) for r in rewards])
            of_rows = compare(whole, torch.cat([m.group for m in micros])).split([len(m.group) for m in micros])
            for m, row in zip(micros, of_rows, strict=True):
                m.advantages = torch.where(m.is_response, row[:, None], 0.0)
        else:
            for m, reward in zip(micros, rewards, strict=True):
                if self.critic:
                    m.values = self._values(m, m.critic_outputs)
                    self._estimate(m, reward)
                else:
                    m.advantages = reward_to_go(reward, m.is_response, ppo.gamma)
            if self.critic:
                stats["explained_variance"] = _explained(micros)
            if ppo.whiten_advantages:
                _whiten(micros)
        rows, total = distributed.global_sum(sum(map(len, finals)), sum(float(f.double().sum()) for f in finals))
        return stats | {"reward_mean": total / rows}

    def _estimate(self, m: Micro, reward: torch.Tensor) -> None:
        """Advantages and returns by GAE, each with its lambda (VC-PPO, 2503.01491: decoupled GAE)."""
        ppo, mask = self.ppo, m.is_response
        lam = length_adaptive_lambda(mask, ppo.lam_alpha) if ppo.lam_alpha else ppo.lam
        m.advantages, m.returns = gae(reward, m.values, mask, ppo.gamma, lam)
        if ppo.critic_lam is not None:
            m.returns = gae(reward, m.values, mask, ppo.gamma, ppo.critic_lam)[1]

    def update(self, minibatches: list[list[Micro]], step: int, kl_coef: float) -> dict[str, float]:
        """Train actor and critic: `ppo.epochs` epochs over the minibatches of a rollout.

        Every epoch has the same minibatches and micro-batches, in another order of the minibatches: in the shapes of
        the rollout the ratio of an unchanged policy is 1, in others rounding alone would move it.

        Args:
            minibatches: the micro-batches of each minibatch, equally many on all ranks.
            step: of PPO, from 1; the actor rests for the first `ppo.critic_warmup_steps`.
            kl_coef: of the penalty in the loss; not used where `ppo.kl.where` is reward.

        Returns:
            Metrics over all updates and ranks: see `_of_updates`.

        Raises:
            DataError: on the first minibatch, before anything is trained, the ratio is not 1; or a loss or gradient
                is not finite.
        """
        ppo = self.ppo
        found: list[tuple[float, dict[str, float]]] = []
        train_policy = step > ppo.critic_warmup_steps
        for epoch in range(ppo.epochs):
            rng = random.Random(stream_seed(self.seed, "ppo", "minibatches", step, epoch))  # the same on all ranks
            for minibatch in rng.sample(minibatches, len(minibatches)):
                if not train_policy and not self.critic:
                    return _of_updates(found)
                tokens, sequences = distributed.global_sum(
                    sum(int(m.is_response.sum()) for m in minibatch), sum(len(m.rows) for m in minibatch)
                )
                stats = self._train_on(minibatch, tokens, sequences, step, kl_coef, train_policy)
                if train_policy and not found:
                    self._check_first(stats["ratio_max_dev"], step)
                found.append((tokens, stats))
                if train_policy and ppo.kl.stop and stats["approx_kl"] > ppo.kl.stop:
                    train_policy = False
        return _of_updates(found)

    def _train_on(
        self, minibatch: list[Micro], tokens: float, sequences: float, step: int, kl_coef: float, train_policy: bool
    ) -> dict[str, float]:
        """Passes over one minibatch of `tokens` response tokens in `sequences` responses on all ranks; then the engines
        step their optimisers.

        Returns:
            Losses, KL and shares of clipped tokens, as means over these tokens; `ratio_max_dev`; gradient norms.
        """
        self.minibatch, where = minibatch, f"ppo step {step}, on a minibatch"
        trained = {"actor": self.actor if train_policy else None, "critic": self.critic}
        engines = {name: engine for name, engine in trained.items() if engine}
        passes: list[dict[str, torch.Tensor]] = []
        for m in minibatch:
            stats = self.policy_pass(m, tokens, sequences, kl_coef) if train_policy else {}
            stats |= self.critic_pass(m, tokens) if self.critic else {}
            passes.append({name: value.detach() for name, value in stats.items()})
            if m is minibatch[-1]:  # the next call updates the weights, which a bundle must have as they are now
                read = distributed.numbers(passes)
                columns = {name: [values[name] for values in read] for name in read[0]}
                losses = {f"values of {name}": column for name, column in columns.items()}
                check_finite(where, losses, ADVICE, [m.prompt_ids for m in minibatch])
            for engine in engines.values():
                engine.step()
        reported = {f"{name}_grad_norm": engine.grad_norm for name, engine in engines.items()}
        check_finite(where, {f"values of {name}": [norm] for name, norm in reported.items()}, ADVICE)
        largest = columns.pop("ratio_max_dev", None)
        # Each number of a micro-batch is its part of a mean over all tokens: parts add up over passes and ranks.
        totals = distributed.global_sum(*map(sum, columns.values()))
        found = dict(zip(columns, totals, strict=True)) | reported
        return found | ({"ratio_max_dev": distributed.global_max(max(largest))} if largest else {})

    def policy_pass(self, m: Micro, tokens: float, sequences: float, kl_coef: float) -> dict[str, torch.Tensor]:
        """Forward and backward pass of the actor; `tokens` (of responses) and `sequences` are those of the minibatch on
        all ranks."""
        ppo = self.ppo
        share = loss_denominator(
            ppo.loss_aggregation, m.is_response, tokens=tokens, sequences=sequences, horizon=self.longest or 1
        )
        options: dict[str, Any] = {"is_weight": m.is_weight, "denominator": tokens, "loss_denominator": share}
        options |= {"dual_clip": ppo.clip.dual} if ppo.objective != "cispo" else {}
        logps, entropy = self.actor(
            m.input_ids, m.attention_mask, m.is_response, with_entropy=ppo.entropy_coef > 0,
            frozen=states_at(m.frozen, self.actor.continues),
        )  # fmt: skip
        loss, stats = OBJECTIVES[ppo.objective](
            logps, m.logprobs, m.advantages, m.is_response, ppo.clip.low, ppo.clip.high, **options
        )
        total = loss
        if entropy is not None:
            total = total - ppo.entropy_coef * masked_mean(entropy, m.is_response, share)
        if ppo.kl.where == "loss" and kl_coef:
            total = total + kl_coef * kl_loss(logps, m.ref_logprobs, m.is_response, share)
        self.actor.backward(total * self._scale(self.actor))
        return {"policy_loss": loss, **stats}

    def critic_pass(self, m: Micro, tokens: float) -> dict[str, torch.Tensor]:
        """Forward and backward pass of the critic."""
        assert self.critic is not None
        loss, clipfrac = value_loss(
            self._values(m, self.critic_outputs(m)), m.values, m.returns, m.is_response,
            self.ppo.clip.value or math.inf, denominator=tokens,
        )  # fmt: skip
        self.critic.backward(loss * self._scale(self.critic))
        return {"value_loss": loss, "value_clipfrac": clipfrac}

    @staticmethod
    def _scale(engine: Engine) -> int:
        # DeepSpeed averages over ranks and accumulated passes; these losses add up to the mean over all tokens.
        return distributed.world_size() * engine.accumulation

    def _check_first(self, deviation: float, step: int) -> None:
        limit = FIRST_RATIO[next(self.actor.module.parameters()).dtype]
        if deviation > limit:
            raise DataError(
                f"ppo step {step}: before any update the ratio to the rollout's policy differs from 1 by "
                f"{deviation:.2g} (limit {limit:g}). Is there dropout, or a kernel that computes "
                "differently in training mode? Set policy.attention=eager"
            )


def _of_updates(found: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Metrics of a step from those of its minibatches, given with their numbers of response tokens.

    `approx_kl`, `clipfrac` and `value_clipfrac` are means over tokens, losses and gradient norms means over updates,
    and `ratio_max_dev` is the largest.
    """
    result = {}
    for name in dict.fromkeys(name for _, stats in found for name in stats):
        values = [stats[name] for _, stats in found if name in stats]
        weights = [tokens if name in OF_TOKENS else 1.0 for tokens, stats in found if name in stats]
        mean = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
        result[name] = max(values) if name == "ratio_max_dev" else mean
    return result


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
