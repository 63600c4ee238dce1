"""Collecting experience: sample with vLLM, score with the proxy, log-probs and values by the trainer."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.batching import balanced, pad_right
from core.data.chat import DataError, stream_seed
from core.generation.local import Completion
from core.models.layers import Lower
from core.training import engine
from ppo.math import importance_weight, kl_k1, kl_k3


@dataclass(slots=True)
class Micro:
    """One micro-batch: the same rows in the same shape for old log-probs and every update, so the first ratio is 1.

    All tensors are [B, L-1]: column t speaks of predicting token t+1. `is_response` is True on response tokens,
    the end of turn included.
    """

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    is_response: Tensor
    sampler_logprobs: Tensor
    proxy: Tensor  # [B], raw reward
    finished: Tensor  # [B], False where cut off
    group: Tensor  # [B], equal for responses to one prompt
    logprobs: Tensor = None
    ref_logprobs: Tensor = None
    values: Tensor = None
    advantages: Tensor = None
    returns: Tensor = None
    is_weight: Tensor = None
    lower: Lower | None = None

    @property
    def reads(self) -> Tensor:
        """[R] into the flattened [B * L], where the critic is read: at the state before each response token."""
        return torch.nn.functional.pad(self.is_response, (0, 1)).flatten().nonzero().squeeze(-1)


@dataclass
class Rollout:
    """One step's responses on this rank, and how long each phase took."""

    micros: list[Micro]
    samples: list[dict]
    policy: int
    """The step whose weights sampled it."""
    behind: int
    """Steps between them and the actor's weights: 0, or 1 with ppo.overlap."""
    seconds: dict[str, float] = field(default_factory=dict)


def prompts_of_step(rows: list[dict], step: int, count: int, seed: int) -> list[dict]:
    """`count` prompts for `step` (from 1): epochs without replacement, each reordered; this rank's share."""
    first = (step - 1) * count
    chosen = []
    for position in range(first, first + count):
        epoch, index = divmod(position, len(rows))
        chosen.append(_epoch_order(len(rows), seed, epoch)[index])
    mine = len(chosen) // engine.world_size()
    return [rows[i] for i in chosen[engine.rank() * mine : (engine.rank() + 1) * mine]]


def _epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(stream_seed(seed, "ppo", "prompts", epoch)).sample(range(n), n)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's responses on this rank, as the sampler gave them; lists of one length."""

    rows: list[dict]  # the prompts
    prompts: list[list[int]]  # their token ids
    policy: int  # the step whose weights sampled them; 0 is the reference
    groups: list[int]  # equal for responses to one prompt
    completions: list[Completion]


def sample(trainer, step: int, policy: int) -> Sampled:
    """Sample with the weights that vLLM has now, those of step `policy`.

    `trainer` is ppo.train.Trainer, here and below.
    """
    ppo = trainer.cfg.ppo
    rows = prompts_of_step(trainer.prompts, step, ppo.prompts_per_step, trainer.seed)
    prompts = [trainer.generator.tokenizer.prompt_ids(row["prompt"]) for row in rows]
    seed = stream_seed(trainer.seed, "ppo", "rollout", step, engine.rank())
    found = trainer.generator.generate(prompts, n=ppo.samples_per_prompt, seed=seed)
    owner = [i for i, group in enumerate(found) for _ in group]
    rows, prompts = ([of_prompt[i] for i in owner] for of_prompt in (rows, prompts))
    return Sampled(rows, prompts, policy, owner, [c for group in found for c in group])


def collect(trainer, step: int) -> Rollout:
    """Sample, score and evaluate one step's rollouts with the current weights."""
    clock = Clock()
    trainer.generator.wake()
    sampled = trainer.responses(step)
    trainer.probe.sampled(sampled.prompts, sampled.completions)
    trainer.sample_ahead(step + 1)
    trainer.generator.sleep()
    clock.lap("generate")
    rows, completions = sampled.rows, sampled.completions
    answered = [
        [*row["prompt"], {"role": "assistant", "content": c.text}] for row, c in zip(rows, completions, strict=True)
    ]
    rewards = trainer.proxy.score(answered)
    clock.lap("score")
    count = len(completions) // trainer.cfg.ppo.micro_batch
    micros = make_micros(sampled.prompts, completions, rewards, sampled.groups, trainer.tokenizer.pad_id, count)
    for micro in micros:
        evaluate(trainer, micro)
    clock.lap("logprobs")
    samples = [
        {
            "step": step,
            "prompt_id": row["prompt_id"],
            "response": c.text,
            "tokens": len(c.token_ids),
            "finished": c.finished,
            "proxy": r,
        }
        for row, c, r in zip(rows, completions, rewards.tolist(), strict=True)
    ]
    return Rollout(micros, samples, sampled.policy, step - 1 - sampled.policy, clock.seconds)


def make_micros(
    prompts: list[list[int]],
    completions: list[Completion],
    rewards: Tensor,
    groups: list[int],
    pad_id: int,
    count: int,
) -> list[Micro]:
    """`count` micro-batches of rows of similar length and of padded sizes as equal as can be.

    Their number is given and not a budget of tokens, since all ranks must make as many passes.
    """
    if empty := sum(not c.token_ids for c in completions):
        raise DataError(f"vLLM returned no token at all for {empty} prompts; is max_new_tokens at least 1?")
    micros = []
    for rows in balanced([len(p) + len(c.token_ids) for p, c in zip(prompts, completions, strict=True)], count):
        ids, mask = pad_right([prompts[i] + completions[i].token_ids for i in rows], pad_id, engine.device())
        is_response = torch.zeros_like(ids, dtype=torch.bool)[:, 1:]
        sampler = torch.zeros(is_response.shape, device=ids.device)
        for b, i in enumerate(rows):
            first, count = len(prompts[i]) - 1, len(completions[i].token_ids)
            is_response[b, first : first + count] = True
            sampler[b, first : first + count] = torch.tensor(completions[i].logprobs)
        finished = torch.tensor([completions[i].finished for i in rows], device=ids.device)
        group = torch.tensor([groups[i] for i in rows], device=ids.device)
        micros.append(Micro(ids, mask, is_response, sampler, rewards[rows].to(ids.device), finished, group))
    return micros


@torch.no_grad()
def evaluate(trainer, micro: Micro) -> None:
    """Fill in the trainer's log-probs, the reference's and the critic's values."""
    inputs = (micro.input_ids, micro.attention_mask, micro.is_response)
    micro.lower = trainer.lower(*inputs[:2]) if trainer.lower else None
    micro.logprobs = trainer.actor(*inputs, lower=micro.lower)[0]
    micro.ref_logprobs = trainer.reference(*inputs, reference=True, lower=micro.lower)[0]
    if trainer.critic:
        micro.values = trainer.learner.values(micro)
    cap = trainer.cfg.ppo.clip.importance_weight
    micro.is_weight = importance_weight(micro.logprobs, micro.sampler_logprobs, cap) if cap else None


def statistics(rollout: Rollout) -> dict[str, float]:
    """Means over the responses, or response tokens, of all ranks; KL is that of the policy that sampled."""
    rows, tokens, kl, k3, mismatch, cut, proxy, square, entropy_bound = 0, 0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0
    for m in rollout.micros:
        mask = m.is_response
        rows += len(mask)
        tokens += int(mask.sum())
        # The trainer's log-probs are the finer ones, but of another policy where it is ahead.
        logps = m.sampler_logprobs if rollout.behind else m.logprobs
        kl += float(kl_k1(logps, m.ref_logprobs)[mask].sum())
        k3 += float(kl_k3(logps, m.ref_logprobs)[mask].sum())
        mismatch += float((m.logprobs - m.sampler_logprobs)[mask].abs().sum())
        cut += int((~m.finished).sum())
        proxy += float(m.proxy.double().sum())
        square += float(m.proxy.double().square().sum())
        entropy_bound += float(-m.logprobs[mask].sum())
    rows, tokens, kl, k3, mismatch, cut, proxy, square, entropy_bound = engine.global_sum(
        rows, tokens, kl, k3, mismatch, cut, proxy, square, entropy_bound
    )
    variance = max(0.0, square / rows - (proxy / rows) ** 2) * rows / max(1.0, rows - 1)
    return {
        "proxy_mean": proxy / rows,
        "proxy_se": (variance / rows) ** 0.5,
        "kl_nats_per_response": kl / rows,
        "kl_k3_nats_per_response": k3 / rows,
        "response_tokens": tokens / rows,
        "eos_rate": 1 - cut / rows,
        "mismatch_mean_abs": mismatch / tokens,
        # -mean log pi of its own samples: an unbiased estimate of the entropy per token
        "entropy_nats": entropy_bound / tokens,
        "tokens": tokens,
    }


class Clock:
    """Seconds per phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
