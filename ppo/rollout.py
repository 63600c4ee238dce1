"""Collecting a rollout: responses by vLLM, rewards by the proxy, log-probs and values by the models that train."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait

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
from ppo.math import clustered_se, importance_weight, kl_k1, kl_k3
from ppo.models import Engines
from ppo.probe import SyncProbe
from ppo.records import Clock, Rollout, Sampled, make_minibatches
from ppo.sampling import prompts_of_step
from ppo.update import Learner


class Collector:
    """Collects one rank's rollout of each step.

    With `ppo.overlap` the responses of the next step are sampled in a thread while this step trains, so they come from
    the policy before the last update.

    Args:
        learner: reads the critic.
        probe: is shown the responses of each step while vLLM is awake.
        prompts: rows with `prompt_id` and `prompt` (messages); the same list on every rank.
        seed: of the order of the prompts and of the samples.

    Attributes:
        policy: the step whose weights vLLM has, 0 for the reference; whoever syncs vLLM sets it.
    """

    def __init__(
        self, ppo: Ppo, engines: Engines, learner: Learner, generator: Generator | ServerGenerator, probe: SyncProbe,
        *, prompts: list[PromptRow], seed: int,
    ):  # fmt: skip
        self._ppo, self._engines, self._learner, self._generator, self._probe = ppo, engines, learner, generator, probe
        self._prompts, self._seed = prompts, seed
        # Now, since a tokenizer finds them out when they are first asked for, and a thread may be using it then.
        self._pad_id, self._fingerprint = generator.tokenizer.pad_id, generator.tokenizer.fingerprint
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future[Sampled] | None = None
        self.policy = 0

    def collect(self, step: int) -> Rollout:
        """Sample, score and evaluate this rank's responses of `step`, with the weights as they are.

        Raises:
            DataError: vLLM returned a response of no token.
        """
        clock = Clock()
        self._generator.wake()
        sampled = self._ahead.result() if self._ahead else self._sample(step, self.policy)
        minibatches = make_minibatches(
            sampled.prompts, sampled.completions, sampled.groups, self._pad_id,
            minibatches=self._ppo.minibatches, micro_batch=self._ppo.micro_batch,
            seed=stream_seed(self._seed, "ppo", "rows", step, distributed.rank()),
        )  # fmt: skip
        micros = [micro for minibatch in minibatches for micro in minibatch]
        for micro in micros:
            micro.prompt_ids = tuple(sampled.rows[i]["prompt_id"] for i in micro.rows.tolist())
        self._probe.sampled(micros, current=sampled.policy == self.policy)
        self._sample_ahead(step + 1)
        self._generator.sleep()
        clock.lap("generate")
        forward = Forward(micros)
        if self._engines.frozen_layers:
            forward.fill_frozen(self._engines.frozen_layers)
        clock.lap("logprobs")
        read = responses(sampled, self._fingerprint)
        rewards = self._engines.proxy.score(read, forward.batches)
        for micro in micros:
            micro.proxy = rewards.to(micro.rows.device)[micro.rows]
        clock.lap("score")
        self._evaluate(forward)
        clock.lap("logprobs")
        samples = _log_rows(step, sampled, rewards.tolist())
        return Rollout(
            minibatches, samples, sampled.policy, step - 1 - sampled.policy, responses=read, seconds=clock.seconds
        )

    def wait(self) -> None:
        """Until the responses that were begun ahead are there, on all ranks: call it before vLLM gets new weights.

        All responses of a step then come from one policy, whichever rank they belong to.
        """
        if self._ahead:
            wait([self._ahead])
            torch.distributed.barrier()

    def _sample_ahead(self, step: int) -> None:
        """With `ppo.overlap`, begin the responses of `step` with the weights that vLLM has now."""
        more = self._ppo.overlap and step <= self._ppo.steps
        self._ahead = self._thread.submit(self._sample, step, self.policy) if more else None

    def _sample(self, step: int, policy: int) -> Sampled:
        """This rank's responses of `step`, by the weights that vLLM has now: those of step `policy`."""
        ppo, generator = self._ppo, self._generator
        rows = prompts_of_step(self._prompts, step, ppo.prompts_per_step, self._seed)
        prompts = [generator.tokenizer.prompt_ids(row["prompt"]) for row in rows]
        seed = stream_seed(self._seed, "ppo", "rollout", step, distributed.rank())
        of_prompts = generator.generate(prompts, n=ppo.samples_per_prompt, seed=seed)
        groups = [i for i, completions in enumerate(of_prompts) for _ in completions]
        completions = [c for completions in of_prompts for c in completions]
        return Sampled([rows[i] for i in groups], [prompts[i] for i in groups], policy, groups, completions)

    @torch.no_grad()
    def _evaluate(self, forward: Forward) -> None:
        """Fill in the log-probs of actor and reference, the critic's outputs and the importance weights."""
        engines, cap = self._engines, self._ppo.clip.importance_weight
        for micro in forward.micros:
            inputs = (micro.input_ids, micro.attention_mask, micro.is_response)
            micro.logprobs = engines.actor(*inputs, frozen=states_at(micro.frozen, engines.actor.continues))[0]
            micro.is_weight = importance_weight(micro.logprobs, micro.sampler_logprobs, cap) if cap else None
        forward.fill("ref_logprobs", self._of_reference)
        if engines.critic:
            forward.fill("critic_outputs", self._learner.critic_outputs)

    def _of_reference(self, rows: Wide) -> Tensor:
        inputs = (rows.input_ids, rows.attention_mask, rows.is_response)
        reference = self._engines.reference
        return reference(*inputs, reference=True, frozen=states_at(rows.frozen, reference.continues))[0]


def responses(sampled: Sampled, tokenizer: str) -> list[ResponseRow]:
    """What the proxy reads: the responses as they were sampled."""
    return [
        {"prompt": row["prompt"], "response": c.text, "token_ids": c.token_ids, "tokenizer": tokenizer}
        for row, c in zip(sampled.rows, sampled.completions, strict=True)
    ]


def _log_rows(step: int, sampled: Sampled, rewards: list[float]) -> list[dict]:
    """The rows of samples.jsonl."""
    return [
        {
            "step": step,
            "prompt_id": row["prompt_id"],
            "response": c.text,
            "tokens": len(c.token_ids),
            "finished": c.finished,
            "proxy": reward,
        }
        for row, c, reward in zip(sampled.rows, sampled.completions, rewards, strict=True)
    ]


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
    }
