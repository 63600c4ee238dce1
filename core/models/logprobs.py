"""Log-probs of chosen tokens without a [batch, tokens, vocabulary] tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KEPT_LOGITS = 1 << 27
"""How many logits of the LM head exist at a time: 256 MiB in bfloat16.

That is 2,700 tokens with a vocabulary of 49k, and 520 tokens with one of 256k.
"""


def token_logprobs(
    lm_head: nn.Linear, hidden: Tensor, tokens: Tensor, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of tokens given the hidden states before them.

    Up to `KEPT_LOGITS` logits are kept for the backward pass, in the model's own type. More than that are computed in
    chunks, and again in the backward pass, so that only one chunk is in memory.

    Args:
        lm_head: Linear(H, V).
        hidden: [M, H].
        tokens: [M].
        temperature: log-probs are of softmax(logits / temperature).
        with_entropy: compute the entropy of each distribution too.

    Returns:
        Log-probs [M] and entropies [M] (or None), both float32 in nats.
    """
    rows = max(1, KEPT_LOGITS // lm_head.out_features)
    parts = []
    for part, ids in zip(hidden.split(rows), tokens.split(rows), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad and len(hidden) > rows:
            parts.append(checkpoint(_chunk, lm_head, part, ids, temperature, with_entropy, use_reentrant=False))
        else:
            parts.append(_chunk(lm_head, part, ids, temperature, with_entropy))
    if not parts:
        empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty if with_entropy else None
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def _chunk(lm_head: nn.Linear, hidden: Tensor, tokens: Tensor, temperature: float, with_entropy: bool):
    return _OfLogits.apply(lm_head(hidden), tokens, temperature, with_entropy)


class _OfLogits(torch.autograd.Function):
    """log softmax(z / T) at the tokens [M], and the entropy H [M], in float32, from logits z [M, V] of any type.

    Works on a few rows at a time. Float32 copies of all logits, of which autograd would keep several, cost more than
    the matrix product where the vocabulary is large. With p = softmax(z / T), the gradients are

        d logp / d z_j = (1[j = token] - p_j) / T
        d H    / d z_j = -p_j (log p_j + H) / T
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool):
        chosen = logits.new_empty(len(logits), dtype=torch.float32)
        entropy = torch.empty_like(chosen) if with_entropy else None
        for at in _blocks(logits):
            logps = _log_softmax(logits[at], temperature)
            chosen[at] = logps.gather(-1, tokens[at, None]).squeeze(-1)
            if entropy is not None:
                entropy[at] = -torch.linalg.vecdot(logps.exp(), logps)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.temperature = temperature
        return chosen, entropy

    @staticmethod
    def backward(ctx, of_logp: Tensor, of_entropy: Tensor | None):
        logits, tokens, entropy = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for at in _blocks(logits):
            logps, scale = _log_softmax(logits[at], ctx.temperature), of_logp[at, None] / ctx.temperature
            p = logps.exp()
            if entropy is None or of_entropy is None:
                of_block = p.mul_(-scale)
            else:
                of_block = p.mul_((logps + entropy[at, None]) * (of_entropy[at, None] / -ctx.temperature) - scale)
            gradient[at] = of_block.scatter_add_(-1, tokens[at, None], scale)
        return gradient, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits if temperature == 1 else logits.float() / temperature, dim=-1, dtype=torch.float32)


def _blocks(logits: Tensor) -> list[slice]:
    """Blocks of rows whose float32 copies stay in a core's cache; on a GPU larger ones, for fewer kernels."""
    rows = max(1, (1 << 26 if logits.is_cuda else 1 << 20) // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
