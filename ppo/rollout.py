"""Collecting a rollout: responses by vLLM, rewards by the proxy, log-probs and values by the models that train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import Ppo
from core.data.rows import PromptRow, ResponseRow
from core.data.streams import stream_seed
from core.generation.local import Generator
from core.generation.remote import ServerGenerator
from core.models.layers import states_at
from core.training import distributed
from ppo.forward import Forward, Wide
from ppo.math import clustered_se, kl_k1, kl_k3
from ppo.methods.ahead import Ahead
from ppo.methods.correction import Weights, correction_metrics, importance_weights
from ppo.methods.dynamic import Scored, chosen, facts, is_enough, more_prompts
from ppo.models import Engines
from ppo.probe import SyncProbe
from ppo.records import Clock, Rollout, Sampled, make_minibatches
from ppo.reward.mixed import PART, MixedReward
from ppo.sampling import all_prompts_of_step, of_rank, prompts_of_step
from ppo.update import Learner


class Collector:
    """Collects one rank's rollout of each step.

    With `ppo.overlap` the responses of later steps are sampled in a thread while this step trains, so they come from an
    earlier policy.

    Args:
        learner: reads the critic.
        probe: is shown the responses of each step while vLLM is awake.
        reward: what is optimised.
        prompts: rows with `prompt_id` and `prompt` (messages); the same list on every rank.
        seed: of the order of the prompts and of the samples.

    Attributes:
        ahead: the rollouts, and the step whose weights vLLM has; whoever syncs vLLM sets it.
    """

    def __init__(
        self, ppo: Ppo, engines: Engines, learner: Learner, generator: Generator | ServerGenerator, probe: SyncProbe,
        reward: MixedReward, *, prompts: list[PromptRow], seed: int,
    ):  # fmt: skip
        self._ppo, self._engines, self._learner, self._generator, self._probe = ppo, engines, learner, generator, probe
        self._reward = reward
        self._prompts, self._seed = prompts, seed
        # Now, since a tokenizer finds them out when they are first asked for, and a thread may be using it then.
        self._pad_id, self._fingerprint = generator.tokenizer.pad_id, generator.tokenizer.fingerprint
        self.ahead = Ahead(self._sample, most=ppo.ahead, last=ppo.steps, carry=ppo.partial_rollouts)

    def collect(self, step: int) -> Rollout:
        """Sample, score and evaluate this rank's responses of `step`, with the weights as they are.

        Raises:
            DataError: vLLM returned a response of no token.
        """
        clock = Clock()
        self._generator.wake()
        scored, found = self._sample_and_score(step) if self._ppo.dynamic_sampling else (None, {})
        sampled = scored.sampled if scored else self.ahead.take(step)
        minibatches = make_minibatches(
            sampled.prompts, sampled.completions, sampled.groups, self._pad_id,
            minibatches=self._ppo.minibatches, micro_batch=self._ppo.micro_batch,
            seed=stream_seed(self._seed, "ppo", "rows", step, distributed.rank()),
        )  # fmt: skip
        micros = [micro for minibatch in minibatches for micro in minibatch]
        for micro in micros:
            micro.prompt_ids = tuple(sampled.rows[i]["prompt_id"] for i in micro.rows.tolist())
        self._probe.sampled(micros, current=sampled.policy == self.ahead.policy and not sampled.carried)
        self.ahead.fill(step + 1)
        self._generator.sleep()
        clock.lap("generate")
        forward = Forward(micros)
        if self._engines.frozen_layers:
            forward.fill_frozen(self._engines.frozen_layers)
        clock.lap("logprobs")
        read = responses(sampled, self._fingerprint)
        if scored:
            rewards, parts = scored.rewards, dict(scored.parts)
        else:
            rewards, parts = self._reward.score(read, forward.batches)
        for micro in micros:
            micro.proxy = rewards.to(micro.rows.device)[micro.rows]
        clock.lap("score")
        found |= correction_metrics(self._ppo.clip, self._evaluate(forward))
        clock.lap("logprobs")
        samples, policy, alike = rows_of(step, sampled, rewards, parts), sampled.policy, True
        if self._ppo.ahead:  # then ranks may have begun this step on two sides of a sync
            policy = -int(distributed.global_max(-sampled.policy))
            alike = policy == distributed.global_max(sampled.policy) and not distributed.global_max(sampled.carried)
            found |= staleness(samples)
        if self._ppo.partial_rollouts:
            carried, rows = distributed.global_sum(len(samples) * sampled.carried, len(samples))
            found["carried_share"] = carried / rows
        return Rollout(
            minibatches, samples, policy, behind=step - 1 - policy, of_one_policy=alike, responses=read,
            seconds=clock.seconds, facts=found,
        )  # fmt: skip

    def _sample_and_score(self, step: int) -> tuple[Scored, dict[str, float]]:
        """This rank's responses of `step`, to prompts whose samples differ in reward, and metrics of the search."""
        ppo, rounds = self._ppo, []
        every = all_prompts_of_step(self._prompts, step, ppo.prompts_per_step, self._seed)
        rows, used = of_rank(every), {row["prompt_id"] for row in every}
        for number in range(ppo.dynamic_sampling or 1):
            if number:
                rows = more_prompts(self._prompts, used, step, number, ppo.prompts_per_step, self._seed)
            if not rows:
                break
            sampled = self._responses(rows, self.ahead.policy, step, *([number] if number else []))
            self._generator.sleep()
            rounds.append(Scored(sampled, *self._reward.score(responses(sampled, self._fingerprint))))
            self._generator.wake()
            if is_enough(rounds, ppo.samples_per_prompt):
                break
        return chosen(rounds, ppo.samples_per_prompt), facts(rounds, ppo.samples_per_prompt)

    def _sample(self, step: int, policy: int) -> Sampled:
        """This rank's responses of `step`, by the weights that vLLM has now: those of step `policy`."""
        rows = prompts_of_step(self._prompts, step, self._ppo.prompts_per_step, self._seed)
        return self._responses(rows, policy, step)

    def _responses(self, rows: list[PromptRow], policy: int, step: int, *more: int) -> Sampled:
        """Responses to these prompts; `more` is part of the name of their random draws."""
        ppo, generator = self._ppo, self._generator
        prompts = [generator.tokenizer.prompt_ids(row["prompt"]) for row in rows]
        seed = stream_seed(self._seed, "ppo", "rollout", step, distributed.rank(), *more)
        of_prompts = generator.generate(prompts, n=ppo.samples_per_prompt, seed=seed)
        groups = [i for i, completions in enumerate(of_prompts) for _ in completions]
        completions = [c for completions in of_prompts for c in completions]
        carried = self.ahead.newest != policy
        return Sampled([rows[i] for i in groups], [prompts[i] for i in groups], policy, groups, completions, carried)

    @torch.no_grad()
    def _evaluate(self, forward: Forward) -> list[tuple[Tensor, Weights]]:
        """Fill in the log-probs of actor and reference, the critic's outputs and the importance weights.

        Returns:
            The response tokens and the importance weights of each micro-batch; empty where there is no correction.
        """
        engines, clip, weights = self._engines, self._ppo.clip, []
        for micro in forward.micros:
            inputs = (micro.input_ids, micro.attention_mask, micro.is_response)
            micro.logprobs = engines.actor(*inputs, frozen=states_at(micro.frozen, engines.actor.continues))[0]
            corrected = importance_weights(clip, micro.logprobs, micro.sampler_logprobs, micro.is_response)
            micro.is_weight = corrected.weights if corrected else None
            weights += [(micro.is_response, corrected)] if corrected else []
        forward.fill("ref_logprobs", self._of_reference)
        if engines.critic:
            forward.fill("critic_outputs", self._learner.critic_outputs)
        return weights

    def _of_reference(self, rows: Wide) -> Tensor:
        inputs = (rows.input_ids, rows.attention_mask, rows.is_response)
        reference = self._engines.reference
        return reference(*inputs, reference=True, frozen=states_at(rows.frozen, reference.continues))[0]


def responses(sampled: Sampled, tokenizer: str) -> list[ResponseRow]:
    """What is rewarded: the responses as they were sampled."""
    rows: list[ResponseRow] = []
    for of, c in zip(sampled.rows, sampled.completions, strict=True):
        row: ResponseRow = {
            "prompt": of["prompt"],
            "response": c.text,
            "token_ids": c.token_ids,
            "tokenizer": tokenizer,
            "prompt_id": of["prompt_id"],
        }
        if "metadata" in of:
            row["metadata"] = of["metadata"]
        rows.append(row)
    return rows


def rows_of(step: int, sampled: Sampled, rewards: Tensor, parts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The rows of the rollout's table, without what `ppo.measured.rollouts.completed` adds to them."""
    columns = {"proxy": rewards.tolist()} | {f"{PART}{name}": part.tolist() for name, part in parts.items()}
    return [
        {
            "step": step,
            "policy": sampled.policy,
            "prompt_id": row["prompt_id"],
            "prompt": row["prompt"],
            "response": c.text,
            "token_ids": np.array(c.token_ids, np.int32),
            "n_tokens": len(c.token_ids),
            "finished": c.finished,
            "sampler_logprobs": np.array(c.logprobs, np.float32),
            **{name: column[i] for name, column in columns.items()},
        }
        for i, (row, c) in enumerate(zip(sampled.rows, sampled.completions, strict=True))
    ]


def staleness(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`staleness_mean` and `staleness_max` of the responses of all ranks: steps from the policy that sampled them to
    the one that they train."""
    steps = [row["step"] - 1 - row["policy"] for row in samples]
    total, rows = distributed.global_sum(sum(steps), len(steps))
    return {"staleness_mean": total / rows, "staleness_max": distributed.global_max(max(steps))}


def statistics(rollout: Rollout) -> dict[str, float]:
    """Means over the responses, or response tokens, of all ranks; KL is that of the policy that sampled.

    `proxy_se` takes the responses to one prompt, which have much of their reward in common, as one cluster.
    """
    names = ("rows", "tokens", "kl", "k3", "mismatch", "cut_off", "proxy", "minus_logp")
    sums = dict.fromkeys(names, 0.0)
    for m in rollout.micros:
        mask = m.is_response
        # The actor's log-probs are the more precise ones, but of another policy where the actor is ahead.
        logps = m.sampler_logprobs if rollout.behind else m.logprobs
        here = (
            len(mask),
            int(mask.sum()),
            float(kl_k1(logps, m.ref_logprobs)[mask].sum()),
            float(kl_k3(logps, m.ref_logprobs)[mask].sum()),
            float((m.logprobs - m.sampler_logprobs)[mask].abs().sum()),
            int((~m.finished).sum()),
            float(m.proxy.double().sum()),
            float(-m.logprobs[mask].sum()),
        )
        for name, value in zip(names, here, strict=True):
            sums[name] += value
    total = dict(zip(names, distributed.global_sum(*sums.values()), strict=True))
    rows, tokens = total["rows"], total["tokens"]
    of_prompts = distributed.gather_rows([(row["prompt_id"], row["proxy"]) for row in rollout.samples])
    parts = [name for name in rollout.samples[0] if name.startswith(PART)]
    of_parts = [sum(row[name] for row in rollout.samples) for name in parts]
    means_of_parts = [whole / rows for whole in distributed.global_sum(*of_parts)] if parts else []
    return {
        "proxy_mean": total["proxy"] / rows,
        "proxy_se": clustered_se([reward for _, reward in of_prompts], [prompt for prompt, _ in of_prompts]),
        "kl_nats_per_response": total["kl"] / rows,
        "kl_k3_nats_per_response": total["k3"] / rows,
        "response_tokens": tokens / rows,
        "eos_rate": 1 - total["cut_off"] / rows,
        "mismatch_mean_abs": total["mismatch"] / tokens,
        # -mean log pi of its own samples: an unbiased estimate of the entropy per token
        "entropy_nats": total["minus_logp"] / tokens,
        "tokens": tokens,
        **rollout.facts,
        **{f"{name}_mean": mean for name, mean in zip(parts, means_of_parts, strict=True)},
    }
