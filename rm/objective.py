"""The loss of one micro-batch of pairs: one forward pass, and what each variant computes from it."""

from __future__ import annotations

import torch
from torch import Tensor

from core.batching import Batch, pack
from core.config import RewardVariant
from core.models.layers import FrozenStateCache
from core.training import distributed
from rm.heads import OdinHead
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


def pair_losses(
    forward, model: RewardModel, variant: RewardVariant, pairs: list[Pair], frozen: FrozenStateCache | None = None
) -> dict[str, Tensor]:
    """Loss and its parts on one micro-batch: scalars `loss`, `reward_loss`, `regulariser` and `accuracy`.

    Each is a mean over the pairs; `loss` has a gradient.

    Args:
        forward: `model`, or the engine that trains it.
        frozen: gives the states of the layers that the variant keeps frozen, if they are cached.
    """
    batch, first, second = packed(model, pairs)
    kind = variant.text_regulariser
    targets = None
    if kind != "none" and variant.alpha > 0:  # no logits of rejected responses unless the loss reads them
        wanted = first if kind.startswith("sft") else [*first, *second]
        targets = batch.targets(wanted, [p.turns for p in pairs] * (len(wanted) // len(pairs)))
    rewards, logps, terms = forward(
        batch.input_ids, batch.attention_mask, positions=batch.positions, read=batch.ends.to(batch.input_ids.device),
        targets=targets, frozen=frozen(batch) if frozen else None, head_terms=True,
    )  # fmt: skip
    chosen, rejected = rewards[first], rewards[second]
    reward_loss = _reward_loss(variant, chosen, rejected, pairs)
    if terms is not None:
        reward_loss = reward_loss + variant.head_weight * _head_penalty(model, batch, terms)
    regulariser = torch.zeros((), device=rewards.device)
    loss = reward_loss
    if targets is not None:
        ref = torch.tensor([p.reference for p in pairs], device=rewards.device).unbind(-1) if kind == "dpo" else ()
        regulariser = text_regulariser(kind, logps[first], logps[second], *ref, beta=variant.beta)
        loss = total_loss(reward_loss, regulariser, variant.alpha)
    return {
        "loss": loss,
        "reward_loss": reward_loss,
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


def _head_penalty(model: RewardModel, batch: Batch, terms: Tensor) -> Tensor:
    """InfoRM: the mean KL of the latents. ODIN: the correlations with length, and the overlap of its two heads."""
    if model.head_kind == "inform":
        return terms.mean()
    assert isinstance(model.head, OdinHead)
    tokens = (batch.ends - batch.starts + 1).to(terms.device)
    return length_disentangling(terms[:, 0], terms[:, 1], tokens) + model.head.overlap()


@torch.no_grad()
def pair_logprobs(
    forward, model: RewardModel, pairs: list[Pair], frozen: FrozenStateCache | None = None
) -> list[tuple[float, float]]:
    """Log-probs (chosen, rejected) of each pair, in nats and summed over tokens, by the model as it is.

    The arguments are those of `pair_losses`.
    """
    batch, first, second = packed(model, pairs)
    targets = batch.targets([*first, *second], [p.turns for p in pairs] * 2)
    logps = forward(
        batch.input_ids, batch.attention_mask, positions=batch.positions, read=batch.ends.to(batch.input_ids.device),
        targets=targets, frozen=frozen(batch) if frozen else None,
    )[1].tolist()  # fmt: skip
    return [(logps[i], logps[j]) for i, j in zip(first, second, strict=True)]
