"""Scoring conversations with a reward model: the one path that every stage uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.data import ChatTokenizer, DataError, Message
from pipelines.models import pad_right


@torch.no_grad()
def score(
    forward: Callable,
    tokenizer: ChatTokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    batch_tokens: int | None = None,
    batch_rows: int | None = None,
    device: torch.device | str = "cpu",
    progress: str = "",
) -> Tensor:
    """Float32 rewards [n] on the CPU, in the order given.

    Conversations are batched by length, up to `batch_tokens` padded tokens or exactly `batch_rows` rows a batch
    (the number of calls is then the same on every rank, as ZeRO-3 needs). Identical conversations are scored
    once, so that they tie exactly.
    """
    tokens = [tuple(tokenizer.conversation_ids(c)) for c in conversations]
    unique = list(dict.fromkeys(tokens)) if batch_rows is None else tokens
    order = sorted(range(len(unique)), key=lambda i: len(unique[i]), reverse=True)
    rewards = torch.full((len(unique),), float("nan"))
    with tqdm(total=len(unique), desc=progress, disable=not progress, unit="resp") as bar:
        for batch in _batches(order, unique, batch_tokens, batch_rows):
            ids, mask = pad_right([list(unique[i]) for i in batch], tokenizer.pad_id, device)
            rewards[batch] = forward(ids, mask)[0].float().cpu()
            bar.update(len(batch))
    if bad := (~rewards.isfinite()).nonzero().flatten().tolist():
        raise DataError(
            f"{len(bad)} of {len(unique)} rewards are not finite; the first is of {tokenizer.decode(unique[bad[0]])!r}"
        )
    if batch_rows is not None:
        return rewards
    place = {t: i for i, t in enumerate(unique)}
    return rewards[[place[t] for t in tokens]]


def _batches(
    order: list[int], rows: Sequence[Sequence[int]], batch_tokens: int | None, batch_rows: int | None
) -> Iterator[list[int]]:
    """Runs of `order` (longest first), each within the budget."""
    batch: list[int] = []
    for i in order:
        full = (
            len(batch) == batch_rows
            if batch_rows
            else (len(batch) + 1) * len(rows[(batch or [i])[0]]) > (batch_tokens or 8192)
        )
        if batch and full:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
