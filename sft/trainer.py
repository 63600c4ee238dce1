"""TRL's SFTTrainer with accelerate's DeepSpeed plugin, made to do as the other stages do.

Optimiser, schedule, DeepSpeed's settings and the order of the data are those of this project; the loop, the loss (a
mean over all tokens with a label of a global batch, without logits of whole rows) and the states are TRL's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from core import config
from core.artefacts import RESUME
from core.config import Optim, Sft
from core.data.chat import ChatTokenizer
from core.models import CausalLM
from core.training import distributed
from core.training.engine import check_state, deepspeed_config
from core.training.optimizer import adamw
from core.training.saved import mark_state, saved_state
from core.training.schedule import factor
from core.training.weights import NamedWeights
from sft.examples import Example, as_columns


class Trainer(SFTTrainer):
    """Fine-tunes a model; every rank makes one, with the same arguments.

    Args:
        lm: the model, whole on the CPU, perhaps with adapters.
        settings: section `engine`, as it is for this stage.
        examples: in the order in which they are trained on, epoch after epoch; a multiple of a global batch.
        out: folder of the stage; its states go into a folder of it.
        seed: of dropout in adapters.
    """

    optimizer: Any  # to a type checker: theirs are of several kinds
    lr_scheduler: Any

    def __init__(
        self, lm: CausalLM, tokenizer: ChatTokenizer, sft: Sft, settings: config.Engine, examples: Sequence[Example],
        out: Path, *, seed: int, callbacks: list[Any],
    ):  # fmt: skip
        distributed.init_distributed()
        join_accelerate()
        self._optim, self._out = sft.optim, out
        super().__init__(
            lm,
            _arguments(sft, settings, out / RESUME, seed),
            # Given, so that neither the tokenizer nor the model's configuration gets another token for padding.
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_id),
            train_dataset=Dataset.from_dict(as_columns(examples)),
            processing_class=tokenizer.hf,
            callbacks=callbacks,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw((p for p in self.model.parameters() if p.requires_grad), self._optim)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            rate: Optim = self._optim
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda s: factor(rate, s, num_training_steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def resume(self) -> int:
        """Train from the last saved state on, or from the beginning; the step that it began after.

        Raises:
            ArtefactError: the state was written by another number of ranks, or is damaged.
        """
        step = saved_state(self._out, distributed.world_size())["step"]
        folder = self._out / RESUME / f"checkpoint-{step}"
        if step:
            check_state(folder)
        self.train(resume_from_checkpoint=str(folder) if step else None)
        return step

    def save_model(self, *_: Any, **__: Any) -> None:
        """Nothing: whole weights are written once, at the end. DeepSpeed's states hold those that are trained."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing, for a state that is deleted when the stage is done."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        torch.distributed.barrier()  # until all shards are written the state is not whole
        if distributed.rank() == 0:
            step = self.state.global_step
            mark_state(self._out, {"step": step, "ranks": distributed.world_size()})
            for old in (self._out / RESUME).glob("checkpoint-*"):
                if old.name != f"checkpoint-{step}":
                    shutil.rmtree(old)

    @torch.no_grad()
    def nll(self, examples: Sequence[Example], micro_batch: int) -> float:
        """Mean NLL of the tokens with a label, in nats. Every rank must call it, with all examples; while it trains."""
        engine, world = self.model_wrapped, distributed.world_size()
        was_training = engine.training
        engine.eval()
        total, count = torch.zeros((), dtype=torch.float64), 0
        # Every rank makes equally many passes, since those of ZeRO-3 need all ranks.
        for first in range(0, len(examples), micro_batch * world):
            start = first + micro_batch * distributed.rank()
            mine = examples[start : start + micro_batch]
            logps, labelled = self._logprobs(engine, mine or examples[:1])
            if mine:
                total -= logps.double().sum().cpu()
                count += int(labelled.sum())
        engine.train(was_training)
        nats, tokens = distributed.global_sum(float(total), float(count))
        return nats / tokens

    def _logprobs(self, engine: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Log-probs of the labelled tokens and which those are, both [B, L-1]."""
        batch = self.data_collator([{"input_ids": e.ids, "labels": e.labels} for e in examples])
        found = engine(**{k: v.to(distributed.device()) for k, v in batch.items()}, fused_lm_head=True, use_cache=False)
        return found.log_probs, found.label_mask

    def trained_values(self) -> Iterator[Tensor]:
        """What this rank holds of the trained weights: whole tensors, or with ZeRO-3 its shards."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield getattr(parameter, "ds_tensor", parameter).detach()

    def named_weights(self) -> NamedWeights:
        """The whole weights, with adapters merged in. Every rank must iterate to the end."""
        return NamedWeights(self.model, self._settle)

    def _settle(self) -> None:
        if any(hasattr(p, "ds_id") for p in self.model.parameters()):
            self.deepspeed.optimizer.empty_partition_cache()


def join_accelerate() -> None:
    """Let accelerate use the process group that there is.

    Where the backend is not named, it finds none for CPUs, and then takes every rank for the only one.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend=torch.distributed.get_backend())


def _arguments(sft: Sft, settings: config.Engine, states: Path, seed: int) -> SFTConfig:
    accumulation = sft.global_batch // (sft.micro_batch * distributed.world_size())
    return SFTConfig(
        output_dir=str(states),
        deepspeed=deepspeed_config(settings, sft.optim, micro_batch=sft.micro_batch, accumulation=accumulation),
        accelerator_config={"use_configured_state": True},
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.dtype == "bfloat16",
        per_device_train_batch_size=sft.micro_batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,  # all epochs stand one after the other in the data, each in an order of its own
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        max_grad_norm=sft.optim.max_grad_norm,
        learning_rate=sft.optim.lr,
        average_tokens_across_devices=True,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=sft.save_every,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
