"""Log-probs of chosen tokens without a [batch, tokens, vocabulary] tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core.models.logits import LmHead, after_head

KEPT_LOGITS = 1 << 27
"""How many logits of the LM head exist at a time: 256 MiB in bfloat16, twice that in float32.

That is 2,700 tokens with a vocabulary of 49k, and 520 tokens with one of 256k.
"""


def token_logprobs(
    head: LmHead, hidden: Tensor, tokens: Tensor, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of tokens given the hidden states before them.

    Up to `KEPT_LOGITS` logits are kept for the backward pass, in the model's own type. More than that are computed in
    chunks, and again in the backward pass, so that only one chunk is in memory.

    Args:
        head: of the model, Linear(H, V) and what follows it.
        hidden: [M, H].
        tokens: [M].
        temperature: log-probs are of softmax(logits / temperature).
        with_entropy: compute the entropy of each distribution too.

    Returns:
        Log-probs [M] and entropies [M] (or None), both float32 in nats.
    """
    rows = max(1, KEPT_LOGITS // head.linear.out_features)
    parts = []
    for part, ids in zip(hidden.split(rows), tokens.split(rows), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad and len(hidden) > rows:
            parts.append(checkpoint(_chunk, head, part, ids, temperature, with_entropy, use_reentrant=False))
        else:
            parts.append(_chunk(head, part, ids, temperature, with_entropy))
    if not parts:
        empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty if with_entropy else None
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def _chunk(head: LmHead, hidden: Tensor, tokens: Tensor, temperature: float, with_entropy: bool):
    return _OfLogits.apply(head.linear(hidden), tokens, (head.scale, head.cap, temperature), with_entropy)


_Form = tuple[float, float | None, float]
"""Scale and cap of the logits (`core.models.logits.after_head`), and the temperature."""


class _OfLogits(torch.autograd.Function):
    """log softmax(z / T) at the tokens [M], and the entropy H [M], in float32, from the output x [M, V] of an LM head.

    z = cap * tanh(scale * x / cap), or scale * x without a cap. Works on a few rows at a time. Float32 copies of all
    logits, of which autograd would keep several, cost more than the matrix product where the vocabulary is large. With
    p = softmax(z / T), the gradients are

        d logp / d z_j = (1[j = token] - p_j) / T
        d H    / d z_j = -p_j (log p_j + H) / T
        d z_j  / d x_j = scale * (1 - (z_j / cap)^2), or scale without a cap
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, form: _Form, with_entropy: bool):
        chosen = logits.new_empty(len(logits), dtype=torch.float32)
        entropy = torch.empty_like(chosen) if with_entropy else None
        for at in _blocks(logits):
            logps = _log_softmax(logits[at], form)
            chosen[at] = logps.gather(-1, tokens[at, None]).squeeze(-1)
            if entropy is not None:
                entropy[at] = -torch.linalg.vecdot(logps.exp(), logps)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.form = form
        return chosen, entropy

    @staticmethod
    def backward(ctx, of_logp: Tensor, of_entropy: Tensor | None):
        logits, tokens, entropy = ctx.saved_tensors
        scale, cap, temperature = ctx.form
        gradient = torch.empty_like(logits)
        for at in _blocks(logits):
            logps, weight = _log_softmax(logits[at], ctx.form), of_logp[at, None] / temperature
            p = logps.exp()
            if entropy is None or of_entropy is None:
                of_block = p.mul_(-weight)
            else:
                of_block = p.mul_((logps + entropy[at, None]) * (of_entropy[at, None] / -temperature) - weight)
            of_block.scatter_add_(-1, tokens[at, None], weight)
            if cap is not None:
                of_block.mul_(1 - torch.tanh(logits[at].float() * (scale / cap)).square())
            gradient[at] = of_block if scale == 1 else of_block.mul_(scale)
        return gradient, None, None, None


def _log_softmax(logits: Tensor, form: _Form) -> Tensor:
    scale, cap, temperature = form
    if cap is not None or scale != 1 or temperature != 1:
        logits = after_head(logits, scale, cap) / temperature
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)


def _blocks(logits: Tensor) -> list[slice]:
    """Blocks of rows whose float32 copies stay in a core's cache; on a GPU larger ones, for fewer kernels."""
    rows = max(1, (1 << 26 if logits.is_cuda else 1 << 20) // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
