"""What one variant is trained on and with: its rows, its untrained model, and the cache of its frozen layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from core import config
from core.config import Model, RewardTraining, RewardVariant
from core.data.chat import ChatTokenizer
from core.data.labels import flip_labels, repeated
from core.data.rows import PairRow
from core.data.streams import stream_seed
from core.errors import ArtefactError
from core.models.architecture import layers_of
from core.models.layers import FrozenLayers, train_top_layers
from core.models.loading import load_causal_lm
from core.models.logits import leave_out_lm_head
from core.models.lora import add_lora
from core.models.state_cache import FrozenStateCache
from core.training import distributed
from core.training.engine import shards
from rm.model import RewardModel
from rm.pairs import seed_name


def arm_rows(train: list[PairRow], variant: RewardVariant, seed: int) -> list[PairRow]:
    """The rows that a variant is trained on: `pairs` of them, with a share `label_noise` of the labels flipped.

    Args:
        train: rows of pairs.parquet, in their order.
        seed: `run.seed`; which labels are flipped depends on it, `variant.data_seed` and the number of rows only.

    Raises:
        ArtefactError: fewer rows than `variant.pairs`.
    """
    drawn = (variant.data_seed,) if variant.data_seed else ()
    if drawn:
        order = np.random.default_rng(stream_seed(seed, "arm_pairs", *drawn)).permutation(len(train))
        train = [train[i] for i in order.tolist()]
    rows = train[: variant.pairs]
    if variant.pairs and len(rows) < variant.pairs:
        raise ArtefactError(f"rm.variants.*.pairs is {variant.pairs} and there are only {len(train)} training pairs")
    # Repeated last: a copy of a pair must not get another label, nor count towards `pairs`.
    return repeated(
        flip_labels(rows, variant.label_noise, np.random.default_rng(stream_seed(seed, "arm_noise", len(rows), *drawn)))
    )


def build(
    rm: RewardTraining, settings: config.Engine, variant: RewardVariant, seed: int
) -> tuple[RewardModel, ChatTokenizer]:
    """The untrained model and its tokenizer; variants with the same `variant.seed` start from the same head.

    Every rank must make it. With several ranks at ZeRO stage 3 the weights of its LM are divided among them. It has an
    LM head of its own only where the loss reads one.

    Args:
        seed: `run.seed`.
    """
    tokenizer = ChatTokenizer(rm.base)
    tokenizer.check()
    lm = load_causal_lm(
        rm.base, dtype=settings.dtype, num_layers=num_layers(rm, variant), float32_head=settings.float32_head,
        shards=shards(settings, settings.zero_stage),
    )  # fmt: skip
    if not variant.regularises:
        leave_out_lm_head(lm)  # `lm_head_of` gives it to the files
    torch.manual_seed(stream_seed(seed, "rm", "head", *seed_name(variant)))
    if rm.lora and variant.trainable_layers is None:
        lm = add_lora(lm, rm.lora)
    else:
        train_top_layers(lm, _trainable(rm, variant))
    model = RewardModel(lm, variant.head, tokenizer)
    model.head_dropout = variant.head_dropout
    return model, tokenizer


def lm_head_of(base: Model, dtype: torch.dtype, depth: int | None) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of each weight of the LM head of `base`.

    Args:
        depth: layers with which `base` can be loaded, None for all. It is read with one layer, where that goes: some
            architectures have layers of several kinds, and need one of each.
    """
    number = str(dtype).removeprefix("torch.")
    try:
        lm = load_causal_lm(base, dtype=number, num_layers=1)
    except ArtefactError:
        lm = load_causal_lm(base, dtype=number, num_layers=depth)
    inside = {id(p) for p in lm.get_output_embeddings().parameters()}
    for name, weight in lm.named_parameters():
        if id(weight) in inside:
            yield name, weight.detach()


def num_layers(rm: RewardTraining, variant: RewardVariant) -> int | None:
    """How many layers of the backbone the variant keeps, from the lowest on; None for all."""
    return rm.num_layers if variant.num_layers is None else variant.num_layers


def _trainable(rm: RewardTraining, variant: RewardVariant) -> int | None:
    return rm.trainable_layers if variant.trainable_layers is None else variant.trainable_layers


def frozen_state_cache(
    rm: RewardTraining, settings: config.Engine, variant: RewardVariant | None = None
) -> FrozenStateCache | None:
    """An empty cache for the layers below the top `rm.trainable_layers` of a backbone as deep as the variant's.

    Every rank holds these layers whole, so that computing their states needs no other rank.

    Args:
        variant: None for a backbone of `rm.num_layers` layers.

    Returns:
        None without `rm.cache_frozen_layers`, or where no layer is frozen.

    Raises:
        ArtefactError: `rm.base.attention` is a flash kernel, or the architecture cannot be cut there.
    """
    if not rm.cache_frozen_layers or rm.trainable_layers is None:
        return None
    base = load_causal_lm(rm.base, dtype=settings.dtype, num_layers=num_layers(rm, variant or RewardVariant()))
    depth = len(layers_of(base)) - rm.trainable_layers
    if depth <= 0:
        return None
    base.to(distributed.device())
    if base.config._attn_implementation.startswith("flash"):
        raise ArtefactError("rm.cache_frozen_layers needs rm.base.attention eager or sdpa: set one of them")
    layers = FrozenLayers(base, depth)
    layers.check(base)
    return FrozenStateCache(layers)


def fits_cache(rm: RewardTraining, variant: RewardVariant) -> bool:
    """Whether this variant keeps all cached layers frozen; the cache is of a backbone of its `num_layers`."""
    trainable = _trainable(rm, variant)
    return trainable is not None and rm.trainable_layers is not None and trainable <= rm.trainable_layers
