"""Configuration of reward models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.config.base import Fraction, Lora, Model, Optim, Section
from core.config.engine import EngineOfStage
from core.config.names import FolderName


class RewardVariant(Section):
    """What distinguishes a reward model from the others of a comparison."""

    text_regulariser: Literal["none", "sft", "sft_plain", "dpo_noref", "dpo"] = "none"
    """none: Bradley-Terry alone. The others are those of GRM (arXiv 2406.10216) and keep the backbone a language model:
    sft and sft_plain on chosen responses, dpo_noref and dpo on pairs. dpo also needs log-probs of the untrained base,
    which are computed once before training."""
    alpha: Fraction = 0.01
    """Weight of the text regulariser: loss = (1 - alpha) * reward loss + alpha * regulariser."""
    beta: float = Field(default=0.1, gt=0)
    """Factor of the log-probs inside the regulariser's log sigmoid. A larger one saturates it sooner. sft_plain has
    none."""
    regularise: Literal["last", "every_turn", "after_first_turn"] = "last"
    """last: the regulariser reads the response alone. every_turn: also the assistant's turns in the prompt.
    after_first_turn: everything after the first user turn, later user turns included, as the GRM authors' code does for
    Unified-Feedback."""
    head: Literal["linear", "mlp", "inform", "odin"] = "mlp"
    """linear: one linear map. mlp: two layers, as in GRM. inform: variational bottleneck (arXiv 2402.09345). odin: a
    reward of length kept apart from quality (arXiv 2402.07319)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share e of wrong labels in conservative labels: loss = (1 - e) * l(d) + e * l(-d), where l(d) is the
    Bradley-Terry loss of the reward difference d. Excludes noise_rate."""
    noise_rate: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels assumed to be wrong. The loss is corrected so that its expectation is that of clean labels (rDPO,
    arXiv 2403.00409). Excludes label_smoothing."""
    margin: float = Field(default=0.0, ge=0)
    """The reward difference of a pair has to exceed margin times its gap in ratings, or in gold (arXiv 2307.09288)."""
    positive: float = Field(default=0.0, ge=0)
    """Weight of -log sigmoid(mean reward of chosen responses), which pushes that mean above 0."""
    center: float = Field(default=0.0, ge=0)
    """Weight of mean((r_chosen + r_rejected)^2), which pins the offset that Bradley-Terry leaves free (arXiv
    2312.09244)."""
    head_weight: float = Field(default=0.1, ge=0)
    """Weight of the head's own terms: InfoRM's KL in nats per latent dimension (its authors use 0.1 to 1), or ODIN's
    correlations and overlap, where its authors use 1. Other heads have none."""
    head_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the head's inputs that is set to 0 while it is trained. The GRM authors' code uses 0.1."""
    num_layers: int | None = Field(default=None, ge=1)
    """Layers that this variant keeps of the base (null: as rm.num_layers). Gives reward models of several sizes."""
    trainable_layers: int | None = Field(default=None, ge=0)
    """Train only the last n layers of this variant (null: as rm.trainable_layers or rm.lora say). 0: the head alone."""
    pairs: int | None = Field(default=None, ge=2)
    """Train on n pairs only (null: all): the first n, or with data_seed n that are drawn. The pairs of a smaller n are
    among those of a larger one."""
    label_noise: Fraction = Field(default=0.0, le=0.5)
    """Share of this variant's training labels that are flipped, after preferences.label_noise. Variants with equally
    many pairs and one data_seed get the same flips."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes of this variant over its training pairs (null: as rm.epochs)."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of this variant (null: as rm.optim.lr). The rest of rm.optim is common to all variants."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives another start of the head and another order of the pairs."""
    data_seed: int = Field(default=0, ge=0)
    """Another one draws other pairs, where `pairs` leaves a choice, and flips other labels. 0: the first pairs."""

    @property
    def regularises(self) -> bool:
        """Whether the loss has a text regulariser, which reads the LM head."""
        return self.text_regulariser != "none" and self.alpha > 0

    @model_validator(mode="after")
    def _one_correction(self) -> RewardVariant:
        if self.noise_rate and self.label_smoothing:
            raise ValueError("noise_rate and label_smoothing exclude each other: both correct for wrong labels")
        return self


class RewardTraining(Section):
    """What all variants have in common."""

    base: Model = Model()
    """The causal LM that every reward model starts from."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep only the first n layers of the base (null: all)."""
    trainable_layers: int | None = Field(default=None, ge=1)
    """Train only the last n layers and the head (null: everything). Excludes lora."""
    cache_frozen_layers: bool = False
    """With trainable_layers: run the frozen layers once per pair and keep their output for the other epochs, variants
    and validation. Faster, but each token takes 2 bytes (float32: 4) per hidden dimension of memory. Variants with
    another num_layers have a cache of their own."""
    lora: Lora | None = None
    """Train adapters in place of the base's own weights (null: no adapters). Excludes trainable_layers."""
    save: Literal["merged", "adapter"] = "merged"
    """merged: whole weights. adapter: with lora, only the adapter and the head, some MB per variant, which are put on
    the base again when the model is read. Variants with trainable_layers of their own are saved whole."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training pairs. Reward models overfit soon: 1 or 2 are usual. A variant may have its own."""
    global_batch: int = Field(default=32, ge=1)
    """Pairs per optimiser step, over all ranks. A multiple of engine.processes * micro_batch."""
    micro_batch: int = Field(default=8, ge=1)
    """Pairs per forward pass on one rank, on average: passes hold equally many tokens, not pairs. Lower it when memory
    runs out."""
    max_tokens: int = Field(default=512, ge=16)
    """Longest conversation in tokens. `overlong` decides about longer ones."""
    overlong: Literal["drop", "truncate", "truncate_right"] = "drop"
    """What happens to a pair with a conversation above max_tokens. drop: it is left out. truncate: the earliest turns
    of its prompt are cut, whole, until it fits. The system turn stays, and a pair whose last turn alone is too long is
    left out. truncate_right: each conversation is cut at its right end, as the GRM authors' code does, and a pair is
    left out whose responses are then equal. All are counted."""
    optim: Optim = Optim(lr=5e-5)
    """Optimiser of every variant. A variant may have its own learning rate."""
    engine: EngineOfStage = EngineOfStage()
    """Processes, memory and number type of this stage, where they differ from `engine`."""
    variants: dict[FolderName, RewardVariant] = {"grm": RewardVariant(text_regulariser="sft"), "bt": RewardVariant()}
    """The reward models, by a name of your own. A file that has this key replaces both default variants: grm, with the
    regulariser sft, and bt, which is Bradley-Terry."""

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

    def epochs_of(self, variant: RewardVariant) -> int:
        """Passes of the variant over its training pairs."""
        return self.epochs if variant.epochs is None else variant.epochs

    def optim_of(self, variant: RewardVariant) -> Optim:
        """The optimiser of the variant: the common one, with its learning rate."""
        return self.optim if variant.lr is None else self.optim.model_copy(update={"lr": variant.lr})
