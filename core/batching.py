"""Token sequences as model inputs: padded rows, and rows in which several responses share one prompt.

A shared row is `prompt | response | response ...`. A response attends to the prompt and to itself, and its positions
continue those of the prompt. So every hidden state equals that of the conversation alone, and the prompt is computed
once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Ids = Sequence[int]
Group = tuple[Ids, Sequence[Ids]]
"""A prompt and its responses."""


class Targets(NamedTuple):
    """The M tokens whose log-probs are to be computed."""

    source: Tensor  # [M] into the flattened [B * L]: the position that predicts the token
    token: Tensor  # [M]
    response: Tensor  # [M]: which of the R responses it belongs to


class Batch(NamedTuple):
    """B rows of L columns with R responses in all, in the order of the groups."""

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L], 0 on padding, 1 on real tokens; in shared rows 2, 3, ... on the responses
    positions: Tensor  # [B, L]
    lengths: list[int]  # [B] real columns
    ends: Tensor  # [R] into the flattened [B * L]: last token of each response
    starts: Tensor  # [R] into the same: the first token of each response
    before: Tensor  # [R] into the same: the last token of its prompt

    def targets(self, wanted: Sequence[int], turns: Sequence[Sequence[tuple[int, int]]] | None = None) -> Targets:
        """All tokens of the responses `wanted` (numbers below R).

        Args:
            turns: for each of `wanted`, spans [start, stop) of its prompt whose tokens are included too.
        """
        parts = []
        for i, r in enumerate(wanted):
            token = torch.arange(int(self.starts[r]), int(self.ends[r]) + 1)
            parts.append((torch.cat([self.before[r : r + 1], token[:-1]]), token, torch.full_like(token, r)))
            row = int(self.before[r]) // self.input_ids.shape[1] * self.input_ids.shape[1]
            for start, stop in turns[i] if turns else ():
                token = torch.arange(row + start, row + stop)
                parts.append((token - 1, token, torch.full_like(token, r)))
        source, token, response = (torch.cat(part) for part in zip(*parts, strict=True))
        where = self.input_ids.device
        return Targets(source.to(where), self.input_ids.flatten()[token.to(where)], response.to(where))


def pad_right(sequences: Sequence[Ids], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both [B, longest]. The mask, not the pad id, marks real tokens."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[i, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def row_length(group: Group) -> int:
    """Tokens of the row that `pack` makes of a group."""
    prompt, responses = group
    return len(prompt) + sum(map(len, responses))


def pack(groups: Sequence[Group], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """One row per group. If every group has one response, the mask is an ordinary one, which every kernel takes."""
    ids, mask = pad_right([[*prompt, *(t for r in responses for t in r)] for prompt, responses in groups], pad_id)
    length = ids.shape[1]
    positions = torch.arange(length).repeat(len(groups), 1)
    shared = any(len(responses) > 1 for _, responses in groups)
    starts, ends, before = [], [], []
    for row, (prompt, responses) in enumerate(groups):
        at = len(prompt)
        for number, response in enumerate(responses, start=2):
            if shared:
                mask[row, at : at + len(response)] = number
            positions[row, at : at + len(response)] -= at - len(prompt)
            starts.append(row * length + at)
            before.append(row * length + len(prompt) - 1)
            at += len(response)
            ends.append(row * length + at - 1)
    return Batch(
        ids.to(device), mask.to(device), positions.to(device), [row_length(group) for group in groups],
        ends=torch.tensor(ends), starts=torch.tensor(starts), before=torch.tensor(before),
    )  # fmt: skip


def attended(mask: Tensor) -> Tensor:
    """Bool [B, 1, L, L] of a mask [B, L] of shared rows: True where a query attends a key.

    That is what is before it in the prompt or in its own response.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    mine, of_prompt = mask[:, :, None] == mask[:, None, :], mask[:, None, :] == 1
    causal = columns[:, None] >= columns[None, :]
    # A padded query attends itself: no NaN.
    real = (mask > 0)[:, None, :] | torch.eye(len(columns), dtype=torch.bool, device=mask.device)
    return ((mine | of_prompt) & causal & real)[:, None]


def in_epochs(count: int, size: int, seeds: Sequence[int]) -> list[list[int]]:
    """Indices below `count` in batches of `size`: one epoch for each seed, in an order of its own and without the
    incomplete batch at its end."""
    batches = []
    for seed in seeds:
        order = random.Random(seed).sample(range(count), count)
        batches += [order[i : i + size] for i in range(0, count - size + 1, size)]
    return batches


def by_length(lengths: Sequence[int], budget: int, *, longest_first: bool = False) -> list[list[int]]:
    """Indices in groups of similar length, each of at most `budget` padded tokens (rows x longest), or of one row."""
    return _runs(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=longest_first), lengths, budget)


def by_length_on_ranks(lengths: Sequence[int], budget: int, ranks: int) -> list[list[int]]:
    """As `by_length`, longest first, in equally many groups for each of `ranks` ranks.

    The groups of several ranks have nearly one padded size. Where there are too few sequences to divide, the last
    group stands there more than once.
    """
    groups = by_length(lengths, budget, longest_first=True)
    if ranks > 1 and groups:
        more = len(groups) + -len(groups) % ranks
        longest = lambda group: max(lengths[i] for i in group)  # noqa: E731
        groups = sorted(balanced(lengths, min(more, len(lengths))), key=longest, reverse=True)
    return groups + groups[-1:] * (-len(groups) % ranks)


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices in `parts` groups of similar length whose padded sizes (rows x longest) are as equal as can be.

    The largest padded size over contiguous runs of the sorted lengths is minimised; no group is empty.

    Raises:
        ValueError: fewer lengths than parts.
    """
    if len(lengths) < parts:
        raise ValueError(f"{len(lengths)} sequences cannot fill {parts} micro-batches")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    low, high = max(lengths), len(lengths) * max(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_runs(order, lengths, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    groups = _runs(order, lengths, low)
    while len(groups) < parts:  # split what is largest until all parts have work
        groups.sort(key=lambda g: (len(g) > 1) * len(g) * lengths[g[-1]])
        largest = groups.pop()
        groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return groups


def evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices in `parts` groups of nearly equally many tokens, for passes that leave padding out; no group is empty.

    The longest sequence that is left goes to the group with the fewest tokens.

    Raises:
        ValueError: fewer lengths than parts.
    """
    if len(lengths) < parts:
        raise ValueError(f"{len(lengths)} sequences cannot fill {parts} micro-batches")
    groups: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        least = min(range(parts), key=lambda k: (sums[k], len(groups[k])))
        groups[least].append(i)
        sums[least] += lengths[i]
    return groups


def evenly_on_ranks(lengths: Sequence[int], budget: int, ranks: int) -> list[list[int]]:
    """Indices in equally many groups for each of `ranks` ranks, of at most `budget` tokens or little more, padding
    left out. Where there are too few sequences to divide, the last group stands there more than once."""
    if not lengths:
        return []
    count = -(-sum(lengths) // budget)
    groups = evenly(lengths, min(count + -count % ranks, len(lengths)))
    return groups + groups[-1:] * (-len(groups) % ranks)


def _runs(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Contiguous runs of `order`, which is by length, each of at most `budget` padded tokens, or of one row."""
    groups: list[list[int]] = []
    for i in order:
        # The longest row of a run is its first or its last one, as the order is from either end.
        if groups and (len(groups[-1]) + 1) * max(lengths[groups[-1][0]], lengths[i]) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
