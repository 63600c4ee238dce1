"""KL from the reference, measured on the policy's own samples."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from core.batching import pad_right
from core.data.chat import ChatTokenizer
from core.models.layers import frozen_layers_of, hidden_states, shared_depth
from core.models.logits import LmHead
from ppo.math import exact_kl, kl_k1, kl_k3

LOGIT_ROWS = 512
"""Rows of the two models' logits that exist at a time: twice 512 x 49k in float32 are 200 MB."""


@torch.no_grad()
def measure_kl(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: ChatTokenizer,
    samples: list[dict],
    temperature: float,
    micro: int,
    *,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """KL(pi || pi_0) in nats per response, three ways, for responses sampled from `policy`.

    kl_k1 and kl_k3 from log-probs of the sampled tokens; kl_rb sums the exact KL of each next-token distribution
    (Rao-Blackwell, Amini et al. 2504.10637), which is unbiased too and varies less.

    Args:
        micro: responses of a forward pass.
        quiet: show no progress bar.
    """
    sequences = [(tokenizer.prompt_ids(s["prompt"]), list(s["token_ids"])) for s in samples]
    # Below the adapters both are the same model: those layers are run once.
    depth = shared_depth(policy.requires_grad_(False), reference.requires_grad_(False))
    frozen_layers = frozen_layers_of(reference, depth, policy, reference) if depth else None
    order = sorted(range(len(samples)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    found: list[dict[str, float]] = [{}] * len(samples)
    for start in tqdm(range(0, len(order), micro), desc="eval: KL", unit="batch", leave=False, disable=quiet):
        batch = order[start : start + micro]
        ids, mask = pad_right(
            [p + r for p, r in (sequences[i] for i in batch)], tokenizer.pad_id, next(policy.parameters()).device
        )
        frozen = frozen_layers(ids, mask) if frozen_layers else None
        states = [hidden_states(lm, ids, mask, frozen=frozen) for lm in (policy, reference)]
        for b, i in enumerate(batch):
            prompt, response = sequences[i]
            span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
            found[i] = response_kl(policy, reference, states[0][b, span], states[1][b, span], response, temperature)
    return found


def response_kl(policy, reference, hidden, ref_hidden, tokens: list[int], temperature: float) -> dict[str, float]:
    """Sums over one response from hidden states [T, H] of both models, logits LOGIT_ROWS rows at a time."""
    heads = LmHead.of(policy), LmHead.of(reference)
    sums = {"logp": 0.0, "kl_k1": 0.0, "kl_k3": 0.0, "kl_rb": 0.0}
    for start in range(0, len(tokens), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logits = heads[0].logits(hidden[rows]) / temperature
        ref_logits = heads[1].logits(ref_hidden[rows]) / temperature
        ids = torch.tensor(tokens[rows], device=hidden.device)[:, None]
        logp, ref = (x.log_softmax(-1).gather(-1, ids).squeeze(-1) for x in (logits, ref_logits))
        sums["logp"] += float(logp.sum())
        sums["kl_k1"] += float(kl_k1(logp, ref).sum())
        sums["kl_k3"] += float(kl_k3(logp, ref).sum())
        sums["kl_rb"] += float(exact_kl(logits, ref_logits).sum())
    return sums
