"""States of frozen layers, kept for all that several models, epochs and measurements compute from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from core.batching import Batch
from core.models.layers import FrozenLayers, FrozenStates


class _Part(NamedTuple):
    """A prompt or a response in a batch [B, L]."""

    key: tuple[bytes, bytes]
    """Its prompt, if it is a response, and its tokens: what decides its states."""
    row: int
    start: int
    stop: int


class FrozenStateCache:
    """Frozen states of prompts and responses, computed once and kept in host memory: for every variant, epoch and
    validation, in whatever rows and order they stand.

    Call it with a batch of `core.batching.pack` to get its states [B, L, H], 0 at padding.
    """

    def __init__(self, layers: FrozenLayers):
        self.layers = layers
        self._states: dict[tuple[bytes, bytes], Tensor] = {}

    def __call__(self, batch: Batch) -> FrozenStates:
        parts = _parts(batch)
        if rows := sorted({part.row for part in parts if part.key not in self._states}):
            self._compute(batch, rows, parts)
        like = self._states[parts[0].key]
        states = like.new_zeros(*batch.input_ids.shape, like.shape[-1])
        for key, row, start, stop in parts:
            states[row, start:stop] = self._states[key]
        return FrozenStates(self.layers.depth, states.to(batch.input_ids.device))

    def _compute(self, batch: Batch, rows: list[int], parts: list[_Part]) -> None:
        """Run the layers over these rows, and keep what is not known."""
        longest = max(batch.lengths[row] for row in rows)
        inputs = (batch.input_ids, batch.attention_mask, batch.positions)
        states = self.layers(*(values[rows, :longest] for values in inputs)).states
        for key, row, start, stop in parts:
            if key not in self._states:
                self._states[key] = states[rows.index(row), start:stop].cpu().clone()


def _parts(batch: Batch) -> list[_Part]:
    """The prompt of each row, and all responses."""
    tokens, length = batch.input_ids.cpu().numpy(), batch.input_ids.shape[1]
    parts: dict[tuple[int, int], _Part] = {}
    spans = zip(batch.starts.tolist(), batch.ends.tolist(), batch.before.tolist(), strict=True)
    for first, last, before in spans:
        row, start = divmod(first, length)
        stop, context = last - row * length + 1, before - row * length + 1
        prompt = tokens[row, :context].tobytes()
        parts[row, 0] = _Part((b"", prompt), row, 0, context)
        parts[row, start] = _Part((prompt, tokens[row, start:stop].tobytes()), row, start, stop)
    return list(parts.values())
