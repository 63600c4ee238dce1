"""Passes without gradients over a rollout, in batches of rows of similar length.

The micro-batches of training are of one minibatch, a random draw of the rollout, and small enough for a backward pass.
Sorted by length, the same rows have less padding, and on a GPU several micro-batches fit into one pass. Only the
actor's log-probs must be computed in the micro-batches themselves: in another shape rounding alone would move the first
ratio from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.batching import balanced
from core.models.layers import FrozenStates
from ppo.records import Micro, positions_read

WIDER = {"cpu": 1, "cuda": 4}
"""Micro-batches a pass, by device. A core is busy with one; a pass without gradients keeps no activations."""


@dataclass(slots=True)
class Wide:
    """R rows of L columns from any micro-batches of a rank; fields are as in `ppo.records.Micro`."""

    input_ids: Tensor
    attention_mask: Tensor
    is_response: Tensor
    sources: list[tuple[Micro, int]]  # [R], the micro-batch of each row and its row there
    frozen: FrozenStates | None = None

    @property
    def reads(self) -> Tensor:
        return positions_read(self.is_response)

    @property
    def rows(self) -> Tensor:
        """[R] the number of each response among those of the rank."""
        return torch.stack([m.rows[b] for m, b in self.sources])


class Forward:
    """The rows of a rollout for passes without gradients; every rank makes the same number of passes."""

    def __init__(self, micros: Sequence[Micro]):
        self.micros = micros
        rows = [(m, b) for m in micros for b in range(len(m.input_ids))]
        lengths = [int(n) for m in micros for n in m.attention_mask.sum(-1)]
        count = max(1, len(micros) // WIDER[micros[0].input_ids.device.type])
        self.batches = [_wide([rows[i] for i in part], max(lengths[i] for i in part))
                        for part in balanced(lengths, count)]  # fmt: skip

    @torch.no_grad()
    def fill(self, name: str, run: Callable[[Wide], Tensor]) -> None:
        """Give every micro-batch a field of this name.

        Args:
            run: a batch -> values [R, L-1], which are 0 outside responses.
        """
        for m in self.micros:
            setattr(m, name, torch.zeros(m.is_response.shape, device=m.input_ids.device))
        for batch in self.batches:
            _spread(run(batch), [(getattr(m, name), b) for m, b in batch.sources])

    @torch.no_grad()
    def fill_frozen(self, layers: Callable[[Tensor, Tensor], FrozenStates]) -> None:
        """Run the shared frozen layers, for the batches and for the micro-batches."""
        for batch in self.batches:
            batch.frozen = layers(batch.input_ids, batch.attention_mask)
            for m, _ in batch.sources:
                m.frozen = m.frozen or _empty_like(batch.frozen, m)
            for i, level in enumerate(batch.frozen.levels):
                _spread(level.states, [(m.frozen.levels[i].states, b) for m, b in batch.sources if m.frozen])


def _empty_like(frozen: FrozenStates, micro: Micro) -> FrozenStates:
    """States of the same depths for the rows of a micro-batch, still all 0."""
    empty = [
        FrozenStates(level.depth, level.states.new_zeros(*micro.input_ids.shape, level.states.shape[-1]))
        for level in frozen.levels
    ]
    return empty[-1]._replace(lower=tuple(empty[:-1]))


def _wide(rows: list[tuple[Micro, int]], length: int) -> Wide:
    column = lambda name, n: _padded([getattr(m, name)[b] for m, b in rows], n)  # noqa: E731
    return Wide(column("input_ids", length), column("attention_mask", length), column("is_response", length - 1), rows)


def _padded(rows: list[Tensor], length: int) -> Tensor:
    """[R, length] rows that are cut, where they are only padding, or filled up with 0."""
    out = rows[0].new_zeros(len(rows), length)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row[:length]
    return out


def _spread(values: Tensor, targets: Sequence[tuple[Tensor, int]]) -> None:
    """Write rows into rows of other tensors, which may be shorter or longer by their padding."""
    for row, (target, b) in zip(values, targets, strict=True):
        n = min(len(row), target.shape[1])
        target[b, :n] = row[:n]
