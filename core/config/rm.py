"""Configuration of reward models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.config.base import Fraction, Lora, Model, Optim, Section


class RewardVariant(Section):
    """One reward model: what differs between the arms of a comparison."""

    text_regulariser: Literal["none", "sft", "sft_plain", "dpo_noref", "dpo"] = "none"
    """none is Bradley-Terry; the others are GRM (arXiv 2406.10216). dpo needs log-probs of the untrained base, which
    are computed once before training."""
    alpha: Fraction = 0.01
    """Weight of the text regulariser: total = (1 - alpha) * reward loss + alpha * regulariser."""
    beta: float = Field(0.1, gt=0)
    regularise: Literal["last", "every_turn"] = "last"
    """The regulariser reads the response alone, or also the assistant's turns in the prompt."""
    head: Literal["linear", "mlp", "inform", "odin"] = "mlp"
    """inform: variational bottleneck (arXiv 2402.09345); odin: length apart from quality (arXiv 2402.07319)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    noise_rate: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong: the loss corrected for them (rDPO, arXiv 2403.00409)."""
    margin: float = Field(0.0, ge=0)
    """Times the gap of ratings (or gold) of a pair: what the reward difference has to exceed (arXiv 2307.09288)."""
    positive: float = Field(0.0, ge=0)
    """Weight of -log sigmoid(mean reward of chosen responses)."""
    center: float = Field(0.0, ge=0)
    """Weight of mean((r_chosen + r_rejected)^2), which pins the free offset of Bradley-Terry (arXiv 2312.09244)."""
    head_weight: float = Field(0.1, ge=0)
    """Weight of the head's own terms: InfoRM's KL in nats, ODIN's correlations and overlap (there 1 is usual)."""
    num_layers: int | None = Field(None, ge=1)
    """In place of rm.num_layers for this variant: reward models of several sizes from one base."""
    trainable_layers: int | None = Field(None, ge=0)
    """In place of rm.trainable_layers for this variant; 0 freezes the backbone."""
    pairs: int | None = Field(None, ge=2)
    """Train on the first so many pairs (null: all): data sizes of one study are nested."""
    label_noise: Fraction = Field(0.0, le=0.5)
    """Share of its training labels that are flipped, the same ones for every variant of as many pairs; beside those of
    preferences.label_noise."""
    seed: int = Field(0, ge=0)
    """Another head and another order of the pairs: the members of an ensemble differ in nothing else."""

    @model_validator(mode="after")
    def _one_correction(self) -> RewardVariant:
        if self.noise_rate and self.label_smoothing:
            raise ValueError("noise_rate and label_smoothing exclude each other: both correct for wrong labels")
        return self


class RewardTraining(Section):
    """Everything that the variants share."""

    base: Model = Model()
    num_layers: int | None = Field(None, ge=1)
    """Use the first so many layers of the backbone (null: all)."""
    trainable_layers: int | None = Field(None, ge=1)
    """Train the last so many layers and the head (null: everything)."""
    cache_frozen_layers: bool = False
    """With trainable_layers: run the layers below once per pair and keep their output (2 H bytes a token in memory)
    for the other variants and epochs. Variants of another num_layers have other layers below, and so a cache of their
    own beside it."""
    lora: Lora | None = None
    save: Literal["merged", "adapter"] = "merged"
    """merged: whole weights. adapter (with lora): the adapter and the head, some MB a variant; the base is read from
    base.path again. Variants with trainable_layers of their own have no adapter, and are whole."""
    epochs: int = Field(1, ge=1)
    global_batch: int = Field(32, ge=1)
    """Pairs per optimiser step, over all ranks."""
    micro_batch: int = Field(8, ge=1)
    """Pairs per forward pass on one rank, on average: passes hold equally many tokens, not pairs."""
    max_tokens: int = Field(512, ge=16)
    """Of a conversation."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Longer pairs are left out, or lose the beginning of their prompt; both are counted."""
    optim: Optim = Optim(lr=5e-5)
    variants: dict[str, RewardVariant] = {"grm": RewardVariant(text_regulariser="sft"), "bt": RewardVariant()}

    @model_validator(mode="after")
    def _consistent(self) -> RewardTraining:
        if not self.variants:
            raise ValueError("rm.variants is empty: name at least one reward model")
        if self.lora and self.trainable_layers:
            raise ValueError("lora and trainable_layers exclude each other (lora.top_layers limits the adapters)")
        if self.save == "adapter" and not self.lora:
            raise ValueError("save: adapter needs lora: without it there is no adapter to save")
        if self.cache_frozen_layers and not self.trainable_layers:
            raise ValueError("cache_frozen_layers needs trainable_layers: otherwise no layer is frozen")
        return self
