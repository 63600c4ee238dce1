"""Passes through a trunk over real tokens only, on CPU: no linear map, norm or activation is computed on padding.

The tokens of all rows are laid end to end in one row, and attention runs over each part of it by itself. Shared rows
(`core.batching.pack`) pay for the pairs of tokens that attend each other only, not for the square of their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL = "unpadded"
"""Name of the attention kernel in transformers' table, while a pass runs."""


class Segment(NamedTuple):
    """Consecutive tokens that attend what is before them in the segment, and the whole prompt of their row."""

    start: int
    stop: int
    prompt: tuple[int, int]
    """Start and stop of the prompt; an empty span for the prompt itself, and for a row of one conversation."""


class Joined(NamedTuple):
    """Where the T real tokens of a batch [B, L] are."""

    real: Tensor  # [T] into the flattened [B * L]
    segments: list[Segment]  # into the T tokens, in their order

    @classmethod
    def of(cls, mask: Tensor) -> Joined:
        """Of a mask [B, L] as `core.models.layers.hidden_states` takes it."""
        flat = mask.flatten()
        real = flat.nonzero().squeeze(1)
        row, part = real // mask.shape[1], flat[real]
        new = torch.ones_like(real, dtype=torch.bool)
        new[1:] = (part[1:] != part[:-1]) | (row[1:] != row[:-1])
        starts = new.nonzero().squeeze(1)
        bounds = [*starts.tolist(), len(real)]
        segments: list[Segment] = []
        prompt = (0, 0)
        for start, stop, number in zip(bounds, bounds[1:], part[starts].tolist(), strict=False):
            segments.append(Segment(start, stop, prompt if number > 1 else (start, start)))
            if number == 1:
                prompt = (start, stop)
        return cls(real, segments)


_current: ContextVar[list[Segment]] = ContextVar("segments")


@contextmanager
def attention_within(trunk: Any, segments: list[Segment]) -> Iterator[None]:
    """Inside the block the attention of `trunk`, given one row of tokens, stays within these segments of it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(KERNEL, _attention)
    kernel, token = trunk.config._attn_implementation, _current.set(segments)
    trunk.config._attn_implementation = KERNEL
    try:
        yield
    finally:
        trunk.config._attn_implementation = kernel
        _current.reset(token)


_HARMLESS = {"position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states", "return_dict",
             "cache_position", "sliding_window"}  # fmt: skip
"""Arguments of attention kernels that change nothing here; a window is looked for where a model is loaded."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: queries [1, h, T, d], keys and values [1, h / g, T, d] -> [1, T, h, d].

    Raises:
        ValueError: dropout, or an option that this kernel does not know, such as a cap.
    """
    unknown = sorted(name for name, x in options.items() if x is not None and name not in _HARMLESS)
    if dropout or unknown or len(query) != 1:
        raise ValueError(f"attention without padding has no {', '.join(unknown) or 'dropout'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _SegmentAttention.apply(query[0], key[0], value[0], scale, _current.get())[None], None


class _SegmentAttention(torch.autograd.Function):
    """softmax(scale q k^T) v within segments: q [h, T, d], k and v [h / g, T, d] -> [T, h, d].

    Query heads i * g to (i + 1) * g - 1 read head i of keys and values. Softmax is in float32.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: list[Segment]):
        q = q * scale
        out = q.new_empty(q.shape[1], len(q), v.shape[-1])
        kept = []
        for segment in segments:
            at = slice(segment.start, segment.stop)
            keys, values = _seen(k, segment), _seen(v, segment)
            scores = torch.bmm(_fold(q[:, at], len(k)), keys.transpose(1, 2))
            scores = scores.view(len(q), -1, keys.shape[1])
            size = scores.shape[1]
            later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1)
            scores[:, :, -size:].masked_fill_(later, float("-inf"))
            shares = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
            mixed = torch.bmm(_fold(shares, len(k)), values)
            out[at] = mixed.view(len(q), size, -1).transpose(0, 1)
            kept.append(shares)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.segments = scale, segments
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        of_q = torch.empty_like(q)
        # A prompt gets a part from each of its responses.
        of_k, of_v = torch.zeros(k.shape, device=k.device), torch.zeros(v.shape, device=v.device)
        for segment, shares in zip(ctx.segments, kept, strict=True):
            at = slice(segment.start, segment.stop)
            of_mixed = _fold(gradient[at].transpose(0, 1), len(k))
            of_shares = torch.bmm(of_mixed, _seen(v, segment).transpose(1, 2)).view_as(shares)
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_scores = _fold(of_scores, len(k))
            of_q[:, at] = torch.bmm(of_scores, _seen(k, segment)).view(len(q), -1, q.shape[-1]).mul_(ctx.scale)
            _add(of_k, segment, torch.bmm(of_scores.transpose(1, 2), _fold(q[:, at], len(k))))
            _add(of_v, segment, torch.bmm(_fold(shares, len(k)).transpose(1, 2), of_mixed))
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None


def _fold(heads: Tensor, groups: int) -> Tensor:
    """[h, M, d] -> [groups, h / groups * M, d]: the queries that read the same keys, below each other."""
    return heads.reshape(groups, -1, heads.shape[-1])


def _seen(keys: Tensor, segment: Segment) -> Tensor:
    """What the segment attends, of [h, T, d]: its prompt, then itself."""
    own, (start, stop) = keys[:, segment.start : segment.stop], segment.prompt
    return torch.cat([keys[:, start:stop], own], dim=1) if stop > start else own


def _add(total: Tensor, segment: Segment, part: Tensor) -> None:
    """Add a gradient of `_seen` to the gradient of what it was taken from."""
    start, stop = segment.prompt
    total[:, start:stop] += part[:, : stop - start]
    total[:, segment.start : segment.stop] += part[:, stop - start :]
