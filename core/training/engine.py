"""Training engines: the only file that imports DeepSpeed.

Every model that is trained (actor, critic, reward model) has an engine of its own, and so have models that are not
(reference, proxy). Each comes from a `deepspeed.initialize` call of its own, so that learning rate, clipping and
checkpoints are each model's own. Call an engine like its module. All ranks must make the same calls in the same order,
except of a frozen model at stage 0, which is a plain module on each rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from core import config
from core.config.base import merge
from core.damage import archive_fault
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.compiled import compile_layers
from core.starting import collect
from core.training import host_states
from core.training.distributed import device, global_sum, init_distributed, rank, world_size
from core.training.optimizer import Spikes, adamw, guard
from core.training.release import release
from core.training.schedule import factor
from core.training.sharding import Shards, num_bytes, taken_over
from core.training.weights import NamedWeights

SPIKES = "grm_spikes"
"""Name in a saved state of what `optim.skip_above` compares gradient norms with."""
FROZEN_SHARE = 0.1
"""Of a GPU's memory: what frozen models may take together and still be whole on every rank."""

NEEDS_ENGINE = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "mics_shard_size",
)  # fmt: skip
"""Settings in `engine.overrides` by which DeepSpeed divides parameters in groups of ranks or in other number types. It
does so when an engine is made, from whole models."""


class Engine:
    """One model under DeepSpeed.

    Args:
        module: its parameters with `requires_grad` are trained.
        cfg: section `engine` of the configuration.
        micro_batch: rows of a forward pass on one rank, on average.
        optim: None makes an engine for inference, at the stage of `frozen_zero_stage`.
        alike: how many frozen models of about this size each rank will hold, with this one.
        accumulation: backward passes per optimiser step; DeepSpeed divides each loss by it.
        total_steps: length of the learning-rate schedule, in optimiser steps.

    Attributes:
        module: the module; under ZeRO-3 its parameters are this rank's shards.
        accumulation: as given.
        continues: how many of the module's lowest layers are run elsewhere, once for several models; whoever runs them
            sets it, and gives their states with each call.
    """

    module: Any  # to a type checker, so that callers may use what their own module has

    def __init__(
        self,
        module: nn.Module,
        cfg: config.Engine,
        *,
        micro_batch: int,
        optim: config.Optim | None = None,
        accumulation: int = 1,
        total_steps: int = 1,
        alike: int = 1,
    ):
        import deepspeed

        init_distributed()
        self.module, self.accumulation, self.continues, self._offloaded = module, accumulation, 0, False
        settings = deepspeed_config(cfg, optim, micro_batch=micro_batch, accumulation=accumulation)
        divided = taken_over(module, getattr(torch, cfg.dtype))
        if optim is None:
            module.requires_grad_(False).eval()
            if not divided and frozen_zero_stage(cfg, alike * num_bytes(module)) == 0:
                self._forward = module.to(device())
                return
            self._deepspeed, *_ = deepspeed.initialize(model=module, config=settings)
            self._forward = self._deepspeed
            return
        module.train()  # gradient checkpointing works in this mode only; dropout is 0 except in adapters
        if cfg.gradient_checkpointing:
            cast(CausalLM, module.lm).gradient_checkpointing_enable({"use_reentrant": False})
        if cfg.compile:
            compile_layers(cast(CausalLM, module.lm))
        trained = self._trained()
        optimizer = adamw(trained, optim)
        self._spikes, self._passes, self._own_norm = Spikes(optim.skip_above), 0, math.inf
        self._reports_norm = cfg.zero_stage > 0 or cfg.dtype != "float32"
        guard(optimizer, self._may_step)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(optim, step, total_steps))
        self._deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=settings
        )
        self._forward = self._deepspeed

    def __call__(self, *args, **kwargs):
        return self._forward(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed averages over ranks and over the accumulated passes."""
        self._deepspeed.backward(loss)

    def step(self) -> None:
        """Count one backward pass; at the end of the accumulation, clip, update and advance the schedule.

        No update is made with a gradient that is not finite, nor with one that `optim.skip_above` calls a spike.
        """
        self._passes += 1
        updates = self._passes % self.accumulation == 0
        if updates and not self._reports_norm:  # DeepSpeed clips there without telling the norm
            self._own_norm = float(nn.utils.get_total_norm([p.grad for p in self._trained() if p.grad is not None]))
        self._deepspeed.step()
        if updates:
            self._spikes.add(self.grad_norm)

    def close(self) -> None:
        """Let go of the module, which DeepSpeed would keep to the end of the process. Nothing is called afterwards."""
        if hasattr(self, "_deepspeed"):
            release(self._deepspeed, self.module)
            del self._deepspeed
        del self._forward, self.module
        collect()

    def _may_step(self) -> bool:
        if not hasattr(self, "_deepspeed"):  # DeepSpeed steps once while it is made, with gradients of 0
            return True
        return math.isfinite(self.grad_norm) and not self._spikes.is_spike(self.grad_norm)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def grad_norm(self) -> float:
        """Norm of the last update's gradient over all ranks, before clipping.

        Infinite where a gradient was not finite. The weights are then those before that update.
        """
        optimizer = self._deepspeed.optimizer  # it knows the norm before the engine does
        norm = getattr(optimizer, "_global_grad_norm", None) if self._reports_norm else self._own_norm
        # DeepSpeed says -1, infinity or NaN, as the stage and the number type have it.
        return float(norm) if norm is not None and 0 <= float(norm) < math.inf else math.inf

    @property
    def skipped(self) -> int:
        """Updates that were left out so far, because `optim.skip_above` called their gradient a spike."""
        return self._spikes.skipped

    def trained_values(self) -> Iterator[Tensor]:
        """What this rank holds of the trained weights: whole tensors, or with ZeRO-3 its shards."""
        for parameter in self._trained():
            if not hasattr(parameter, "ds_tensor"):
                yield parameter.detach()
                continue
            of_zero: Any = parameter  # with the attributes that ZeRO-3 adds
            place = torch.distributed.get_rank(of_zero.ds_process_group)
            # The last shards are longer than what is left for them, and nothing is ever written there.
            share: Tensor = of_zero.ds_tensor
            yield share.detach()[: max(0, of_zero.ds_numel - place * share.numel())]

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self._deepspeed.get_lr()[0]

    def offload_states(self) -> None:
        """Keep the optimiser's states and float32 weights in host memory until `reload_states`, at stage 1, 2 or 3.

        In between, passes and `save` work as usual, `step` does not. Does nothing the second time.
        """
        if not self._offloaded:
            host_states.offload(self._deepspeed)
            self._offloaded = True

    def reload_states(self) -> None:
        """Undo `offload_states`, if it was called."""
        if self._offloaded:
            host_states.reload(self._deepspeed, device())
            self._offloaded = False

    def settle(self) -> None:
        """End ZeRO-3's prefetches, some of which a pass over a part of the model leaves pending.

        Call it before weights are read.
        """
        if any(hasattr(p, "ds_id") for p in self.module.parameters()):
            # What the engine's own method does, without its two collections of garbage, which take longer.
            self._deepspeed.optimizer.empty_partition_cache()

    def named_weights(self, lm: CausalLM, **options) -> NamedWeights:
        """The whole weights of `lm`, a part of this engine's module; `options` are those of `named_weights`."""
        return NamedWeights(lm, self.settle, **options)

    def save(self, folder: Path) -> None:
        """Write weights, optimiser and schedule of every rank, to resume from."""
        self.settle()
        offloaded = self._offloaded
        self.reload_states()
        self._deepspeed.save_checkpoint(str(folder), tag="state", client_state={SPIKES: self._spikes.state_dict()})
        if offloaded:
            self.offload_states()

    def load(self, folder: Path) -> None:
        """Resume from what `save` wrote, on the same number of ranks.

        Raises:
            ArtefactError: a file of the state is damaged, or it is that of another model.
            RuntimeError: `folder` holds no state.
        """
        check_state(folder)
        try:
            path, kept = self._deepspeed.load_checkpoint(str(folder), tag="state")
        except RuntimeError as error:
            if "in loading state_dict" not in str(error):
                raise
            said = " ".join(str(error).split())[:300]
            raise ArtefactError(
                f"{folder} is the state of another model, or was written by an earlier version ({said}): delete "
                f"{folder.parent.parent} to start the stage again"
            ) from None
        if path is None:
            raise RuntimeError(f"no engine state in {folder}; delete it and run the stage again")
        if spikes := (kept or {}).get(SPIKES):  # earlier versions kept none
            self._spikes.load_state_dict(spikes)
        self._passes = 0


def check_state(folder: Path) -> None:
    """ArtefactError on every rank where a file of a saved state is damaged; each rank reads its share of them."""
    files = sorted(folder.rglob("*.pt"))
    faults = [f"{file} {fault}" for file in files[rank() :: world_size()] if (fault := archive_fault(file))]
    if global_sum(float(len(faults)))[0]:
        found = faults[0] if faults else f"another rank found a damaged file in {folder}"
        raise ArtefactError(f"{found}: delete {folder.parent.parent} to start the stage again")


def frozen_zero_stage(cfg: config.Engine, together: int) -> int:
    """The stage of models that are not trained: 0 or 3.

    Args:
        together: bytes of all of them.
    """
    if cfg.frozen_zero_stage != "auto":
        return cfg.frozen_zero_stage
    if cfg.zero_stage < 3 or not (cfg.offload or torch.cuda.is_available()):
        return 0
    return 3 if cfg.offload or together > FROZEN_SHARE * torch.cuda.get_device_properties(device()).total_memory else 0


def shards(cfg: config.Engine, stage: int) -> Shards | None:
    """What divides a model while it is read, for an engine of this stage; None where each rank reads it whole.

    Call it after `init_distributed`, with the same arguments on every rank.
    """
    settings = deepspeed_config(cfg, None, micro_batch=1, accumulation=1)
    if stage != 3 or world_size() == 1 or settings.get("fp16", {}).get("enabled"):
        return None
    return None if any(settings["zero_optimization"].get(key) for key in NEEDS_ENGINE) else Shards(settings)


def deepspeed_config(cfg: config.Engine, optim: config.Optim | None, *, micro_batch: int, accumulation: int) -> dict:
    """DeepSpeed's settings, derived from the configuration, with `cfg.overrides` merged over them.

    Args:
        optim: None for an engine that does not train, at stage 3.
        micro_batch: rows of a forward pass on one rank.
        accumulation: backward passes per optimiser step.
    """
    cpu_offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    stage = cfg.zero_stage if optim else 3
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 10_000, "overlap_comm": torch.cuda.is_available()}
    if cfg.offload and stage == 3:
        zero["offload_param"] = cpu_offload
    if cfg.offload and stage > 0 and optim:
        zero["offload_optimizer"] = cpu_offload
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": cfg.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": optim.max_grad_norm if optim else 0.0,
        "steps_per_print": 10**9,
    }
    return merge(settings, cfg.overrides)
