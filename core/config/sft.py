"""Configuration of supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config.base import Fraction, Lora, Optim, Section
from core.config.engine import EngineOfStage


class Sft(Section):
    """Supervised fine-tuning of the policy on demonstrations. Without this section there is no such stage. With it, the
    policy of all later stages is the fine-tuned one, which is also the reference of PPO. Reward models start from
    rm.base all the same."""

    data: Path
    """Demonstrations: a file, a folder or a hub id, as in preferences.sources. A row has a prompt and an answer, or a
    conversation that ends with the assistant; of preference pairs the chosen response is taken."""
    subset: str | None = None
    """Configuration of a hub dataset or of a local copy of one, or one of its folders (null: its default)."""
    split: str = "train"
    """Only this split is read."""
    revision: str | None = None
    """Hub revision of the data: a commit, tag or branch (null: the newest)."""
    max_rejected_share: Fraction = 0.01
    """A larger share of malformed rows is an error. All of them are listed in `rejected.jsonl`."""
    max_demonstrations: int | None = Field(default=None, ge=2)
    """Keep at most n demonstrations, chosen by hash (null: all)."""
    val_share: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Share of the demonstrations that are not trained on, by a hash of the first user turn. Their NLL is measured
    before training and after each epoch: more epochs help while it falls."""
    loss_on: Literal["every_turn", "last"] = "every_turn"
    """every_turn: the loss is on all turns of the assistant, ends of turns included. last: on the last one alone. It is
    never on system and user turns."""
    lora: Lora | None = None
    """Train adapters, which are merged into the saved policy (null: train all weights)."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the demonstrations, each in an order of its own."""
    global_batch: int = Field(default=32, ge=1)
    """Demonstrations per optimiser step, over all ranks. A multiple of engine.processes * micro_batch. The incomplete
    batch at the end of an epoch is left out."""
    micro_batch: int = Field(default=4, ge=1)
    """Demonstrations per forward pass on one rank. Lower it when memory runs out."""
    max_tokens: int = Field(default=1024, ge=16)
    """Longer demonstrations are left out, counted."""
    optim: Optim = Optim(lr=2e-5)
    """Optimiser. skip_above is refused here."""
    save_every: int = Field(default=100, ge=1, json_schema_extra={"decides_result": False})
    """Optimiser steps between two states from which a stopped or killed stage goes on."""
    engine: EngineOfStage = EngineOfStage()
    """Processes, memory and number type of this stage, where they differ from `engine`."""

    @model_validator(mode="after")
    def _of_others(self) -> Sft:
        if self.optim.skip_above is not None:
            raise ValueError("optim.skip_above is for rm and ppo: stage sft makes every update; leave it out")
        if self.engine.compile:
            raise ValueError("engine.compile is for rm and ppo: leave it out")
        return self
