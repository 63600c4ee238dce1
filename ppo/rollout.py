"""Collecting experience: sample with vLLM, score with the proxy, log-probs and values by the trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from core.batching import balanced, pad_right
from core.data.chat import conversation
from core.errors import DataError
from core.generation.local import Completion
from core.training import distributed
from ppo.math import importance_weight, kl_k1, kl_k3
from ppo.records import Clock, Micro, Rollout


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
    answered = [conversation(row["prompt"], c.text) for row, c in zip(rows, completions, strict=True)]
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
        ids, mask = pad_right([prompts[i] + completions[i].token_ids for i in rows], pad_id, distributed.device())
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
    rows, tokens, kl, k3, mismatch, cut, proxy, square, entropy_bound = distributed.global_sum(
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
