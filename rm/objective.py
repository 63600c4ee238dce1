"""The loss of one micro-batch of pairs: one forward pass, and what each variant computes from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.batching import Batch, balanced, evenly, pack
from core.config import RewardVariant
from core.models.state_cache import FrozenStateCache
from core.training import distributed
from rm.losses import (
    bradley_terry,
    center_penalty,
    length_disentangling,
    positive_penalty,
    text_regulariser,
    total_loss,
)
from rm.model import RewardModel
from rm.pairs import Pair


def packed(model: RewardModel, pairs: list[Pair]) -> tuple[Batch, list[int], list[int]]:
    """The batch of these n pairs, and the indices [n] of their chosen and of their rejected responses in it."""
    n, pad = len(pairs), model.tokenizer.pad_id
    if model.shares_prompts:
        batch = pack([(p.prompt, [p.chosen, p.rejected]) for p in pairs], pad, distributed.device())
        return batch, list(range(0, 2 * n, 2)), list(range(1, 2 * n, 2))
    rows = [(p.prompt, [p.chosen]) for p in pairs] + [(p.prompt, [p.rejected]) for p in pairs]
    return pack(rows, pad, distributed.device()), list(range(n)), list(range(n, 2 * n))


def divided(model: RewardModel, pairs: Sequence[Pair], parts: int) -> list[list[int]]:
    """Indices into `pairs` in micro-batches that take equally long; no micro-batch is empty.

    Raises:
        ValueError: fewer pairs than parts.
    """
    lengths = [pair.row for pair in pairs]
    return evenly(lengths, parts) if model.skips_padding else balanced(lengths, parts)


class BatchCorrelations(NamedTuple):
    """ODIN's correlations with length over a whole batch, as one of its micro-batches needs them."""

    value: float
    """`length_disentangling` over all R responses of the batch."""
    slopes: Tensor
    """[M, 2]: its derivatives with respect to quality and length of the M responses of the micro-batch."""
    share: float
    """Of the batch's pairs that the micro-batch has."""


def batch_correlations(
    forward, model: RewardModel, micro_batches: Sequence[list[Pair]], frozen: FrozenStateCache | None = None
) -> list[BatchCorrelations | None]:
    """For each micro-batch of this rank, what ODIN's loss needs from the others; None where it needs nothing.

    A correlation is no mean over pairs. One pair always gives 1 or -1, with no gradient, and micro-batches are sorted
    by length. So it is taken over the batch of an optimiser step, on all ranks. A forward pass without gradients gives
    the rewards of all responses. The derivatives with respect to each of them are then those of one large batch.

    Every rank must call it, with equally many micro-batches. Dropout draws what it draws in the pass that follows.

    Args:
        forward, frozen: as of `pair_losses`.
    """
    if model.head_kind != "odin" or len(micro_batches) * distributed.world_size() == 1:
        return [None] * len(micro_batches)
    mine = []
    with torch.no_grad(), torch.random.fork_rng(devices=_generators()):
        for pairs in micro_batches:
            batch, *_ = packed(model, pairs)
            terms = _forward(forward, batch, frozen, head_terms=True)[2]
            mine.append(
                [[distributed.rank(), *row] for row in torch.cat([terms[:, :2], _tokens(batch, terms)], 1).tolist()]
            )
    ranks, quality, length, tokens = torch.tensor(distributed.gather_rows(sum(mine, [])), dtype=torch.float64).unbind(
        -1
    )
    parts = torch.stack([quality, length], dim=-1).requires_grad_()
    value = length_disentangling(parts[:, 0], parts[:, 1], tokens)
    (slopes,) = torch.autograd.grad(value, parts)
    of_rank = slopes[ranks == distributed.rank()].float().split([len(rows) for rows in mine])
    return [
        BatchCorrelations(float(value.detach()), part.to(distributed.device()), len(part) / len(slopes))
        for part in of_rank
    ]


def pair_losses(
    forward,
    model: RewardModel,
    variant: RewardVariant,
    pairs: list[Pair],
    frozen: FrozenStateCache | None = None,
    correlations: BatchCorrelations | None = None,
) -> dict[str, Tensor]:
    """Loss and its parts on one micro-batch: `loss`, `reward_loss`, `head_penalty`, `regulariser` and `accuracy`.

    Each is a scalar and a mean over the pairs; `loss` has a gradient. `head_penalty` is the head's own term before its
    weight: InfoRM's KL, or ODIN's correlations and overlap. It is 0 for other heads.

    Args:
        forward: `model`, or the engine that trains it.
        frozen: gives the states of the layers that the variant keeps frozen, if they are cached.
        correlations: of `batch_correlations`, where the pairs are a part of a batch. None: they are the whole batch.
    """
    batch, first, second = packed(model, pairs)
    kind = variant.text_regulariser
    targets = None
    if variant.regularises:  # no logits of rejected responses unless the loss reads them
        wanted = first if kind.startswith("sft") else [*first, *second]
        targets = batch.targets(wanted, [p.turns for p in pairs] * (len(wanted) // len(pairs)))
    rewards, logps, terms = _forward(forward, batch, frozen, targets=targets, head_terms=True)
    chosen, rejected = rewards[first], rewards[second]
    reward_loss = _reward_loss(variant, chosen, rejected, pairs)
    penalty = regulariser = torch.zeros((), device=rewards.device)
    loss = reward_loss
    if terms is not None:
        penalty = _head_penalty(model, batch, terms, correlations)
        loss = loss + variant.head_weight * penalty
    if targets is not None:
        ref = torch.tensor([p.reference for p in pairs], device=rewards.device).unbind(-1) if kind == "dpo" else ()
        regulariser = text_regulariser(kind, logps[first], logps[second], *ref, beta=variant.beta)
        loss = total_loss(loss, regulariser, variant.alpha)
    return {
        "loss": loss,
        "reward_loss": reward_loss,
        "head_penalty": penalty,
        "regulariser": regulariser,
        "accuracy": (chosen > rejected).float().mean(),
    }


def _reward_loss(variant: RewardVariant, chosen: Tensor, rejected: Tensor, pairs: list[Pair]) -> Tensor:
    margin = torch.tensor([p.margin for p in pairs], device=chosen.device) if variant.margin else None
    loss = bradley_terry(
        chosen, rejected, margin=margin, label_smoothing=variant.label_smoothing, noise_rate=variant.noise_rate
    )
    if variant.positive:
        loss = loss + variant.positive * positive_penalty(chosen)
    if variant.center:
        loss = loss + variant.center * center_penalty(chosen, rejected)
    return loss


def _head_penalty(
    model: RewardModel, batch: Batch, terms: Tensor, correlations: BatchCorrelations | None = None
) -> Tensor:
    """InfoRM: the mean KL of the latents. ODIN: the correlations with length, and the overlap of its two heads."""
    if model.head_kind == "inform":
        return terms.mean()
    parts, overlap = terms[:, :2], terms[:, 2].mean()
    if correlations is None:
        return length_disentangling(parts[:, 0], parts[:, 1], _tokens(batch, terms).squeeze(1)) + overlap
    # The value is the batch's. The gradient is divided by the share that the loss of this micro-batch is weighted with.
    change = (correlations.slopes * (parts - parts.detach())).sum()
    return correlations.value + change / correlations.share + overlap


def _tokens(batch: Batch, like: Tensor) -> Tensor:
    """Lengths of the responses [R, 1] in tokens."""
    return (batch.ends - batch.starts + 1)[:, None].to(like)


def _forward(forward, batch: Batch, frozen: FrozenStateCache | None, **options) -> tuple[Tensor, Tensor, Tensor]:
    return forward(
        batch.input_ids, batch.attention_mask, positions=batch.positions, read=batch.ends.to(batch.input_ids.device),
        frozen=frozen(batch) if frozen else None, **options,
    )  # fmt: skip


def _generators() -> list[torch.device]:
    """Devices other than the CPU whose random generators a forward pass draws from."""
    return [distributed.device()] if distributed.device().type == "cuda" else []


@torch.no_grad()
def pair_logprobs(
    forward, model: RewardModel, pairs: list[Pair], frozen: FrozenStateCache | None = None
) -> list[tuple[float, float]]:
    """Log-probs (chosen, rejected) of each pair, in nats and summed over tokens, by the model as it is.

    The arguments are those of `pair_losses`.
    """
    batch, first, second = packed(model, pairs)
    targets = batch.targets([*first, *second], [p.turns for p in pairs] * 2)
    logps = _forward(forward, batch, frozen, targets=targets)[1].tolist()
    return [(logps[i], logps[j]) for i, j in zip(first, second, strict=True)]
