"""Scoring of conversations with a reward model, for all stages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from core.batching import Batch, Group, Ids, by_length_on_ranks, evenly_on_ranks, pack, row_length
from core.data.chat import ChatTokenizer
from core.errors import DataError
from core.models.layers import FrozenStates
from core.training.distributed import global_sum, rank, world_size
from rm.reading import Tokens


class Limits(NamedTuple):
    """How a model takes rows of tokens."""

    positions: int = sys.maxsize
    """Tokens of a conversation, at most."""
    row_tokens: int = 1024
    """Tokens of a row in which responses share their prompt, at most; 0 where each response needs a row of its own.
    Attention that is computed on a whole row costs the square of its length."""
    padded: bool = True
    """Whether padding costs as much as tokens (`core.models.layers.skips_padding`)."""


@torch.no_grad()
def score_tokens(
    forward: Callable,
    tokenizer: ChatTokenizer,
    tokens: Sequence[Tokens],
    *,
    batch_tokens: int = 8192,
    limits: Limits = Limits(),  # noqa: B008
    together: bool = False,
    finite: bool = True,
    frozen: Callable[[Batch], FrozenStates] | None = None,
    device: torch.device | str = "cpu",
    progress: str | tqdm = "",
) -> Tensor:
    """Float32 rewards [n] on the CPU, in the order given.

    Identical conversations are scored once, so that their rewards are equal. Batches hold up to `batch_tokens` tokens,
    padding included where it is computed; rows of similar length are then together.

    Args:
        forward: a `RewardModel`, or an engine that holds one.
        limits: of the model. A prompt is computed once for the responses that share a row with it.
        together: all ranks pass the same rows and divide the work evenly, with the same number of calls each, as
            ZeRO-3 requires. Every rank gets all rewards.
        finite: refuse rewards that are not.
        frozen: gives the frozen states of a batch, so that the model's frozen layers are not run here.
        progress: title of a progress bar, or a bar of the caller's; none by default.

    Raises:
        DataError: a conversation of more tokens than the model has positions, by its number; rewards that are not
            finite.
    """
    check_lengths([len(prompt) + len(response) for prompt, response in tokens], limits.positions)
    rows = _rows(sorted(set(tokens)), min(limits.row_tokens, batch_tokens))
    # Longest first, so that a batch that does not fit into memory fails at once.
    ranks, first = (world_size(), rank()) if together else (1, 0)
    divided = by_length_on_ranks if limits.padded else evenly_on_ranks
    groups = divided([row_length(row) for row in rows], batch_tokens, ranks)
    mine = [[rows[i] for i in group] for group in groups[first::ranks]]
    reward_of: dict[tuple, float] = {}
    count, quiet = sum(len(rs) for b in mine for _, rs in b), not progress or (together and rank() != 0)
    own = (
        tqdm(total=count, desc=progress, disable=quiet, unit="resp")
        if isinstance(progress, str)
        else nullcontext(progress)
    )
    with own as bar:
        for batch in mine:
            inputs = pack(batch, tokenizer.pad_id, device)
            rewards = forward(
                inputs.input_ids, inputs.attention_mask, positions=inputs.positions, read=inputs.ends.to(device),
                frozen=frozen(inputs) if frozen else None,
            )[0]  # fmt: skip
            keys = [(prompt, response) for prompt, responses in batch for response in responses]
            reward_of |= zip(keys, rewards.float().tolist(), strict=True)
            bar.update(len(keys))
    if together:
        reward_of = _all_ranks(reward_of, sorted(set(tokens)))
    result = torch.tensor([reward_of[t] for t in tokens], dtype=torch.float32)
    if finite and (bad := (~result.isfinite()).nonzero().flatten().tolist()):
        raise DataError(
            f"{len(bad)} of {len(result)} rewards are not finite; the first is of the response "
            f"{tokenizer.decode(tokens[bad[0]][1])!r}"
        )
    return result


def check_lengths(lengths: Sequence[int], positions: int, what: str = "conversation") -> None:
    """DataError for sequences of more tokens than a model has positions; it names the first by its number, from 0."""
    if long := [i for i, length in enumerate(lengths) if length > positions]:
        raise DataError(
            f"{what} {long[0]} has {lengths[long[0]]} tokens, but the reward model has {positions} positions "
            f"({len(long)} of {len(lengths)} are too long): shorten them or leave them out, or use a model with more"
        )


def _rows(pairs: Sequence[tuple], row_tokens: int) -> list[Group]:
    """Pairs (prompt, response), sorted by prompt -> rows of one prompt and as many responses as fit."""
    if not row_tokens:
        return [(prompt, [response]) for prompt, response in pairs]
    rows: list[Group] = []
    for prompt, group in groupby(pairs, key=lambda pair: pair[0]):
        responses: list[Ids] = []
        length = row_tokens + 1
        for _, response in group:
            if length + len(response) > row_tokens:
                responses, length = [], len(prompt)
                rows.append((prompt, responses))
            responses.append(response)
            length += len(response)
    return rows


def _all_ranks(reward_of: dict[tuple, float], order: list[tuple]) -> dict[tuple, float]:
    """The rewards of all ranks, on every rank. Where two ranks scored the same batch, their mean."""
    sums = global_sum(*(reward_of.get(key, 0.0) for key in order))
    counts = global_sum(*(float(key in reward_of) for key in order))
    return {key: total / count for key, total, count in zip(order, sums, counts, strict=True)}
