"""Training engines: the only file that imports DeepSpeed.

Every trained model has an engine of its own (actor, critic, reward model), and so may frozen ones
(reference, proxy): separate `deepspeed.initialize` calls, so learning rate, clipping and checkpoints are
each model's own. Call an engine like its module; all ranks must make the same calls in the same order.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core import config
from core.config.load import merge
from core.models.layers import lora_modules, lora_product, merged_lora


def init_distributed() -> None:
    """Join the process group of the launcher; outside one, make a group of this process alone."""
    import deepspeed

    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def global_sum(*values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather_rows(rows: list) -> list:
    """The rows of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return rows
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


class Engine:
    """One model under DeepSpeed.

    Args:
        module: its parameters with `requires_grad` are trained.
        optim: None makes an engine for inference.
        accumulation: backward passes per optimiser step; DeepSpeed divides each loss by it.
        total_steps: length of the learning-rate schedule, in optimiser steps.
    """

    def __init__(
        self,
        module: nn.Module,
        cfg: config.Engine,
        *,
        micro_batch: int,
        optim: config.Optim | None = None,
        accumulation: int = 1,
        total_steps: int = 1,
    ):
        import deepspeed

        init_distributed()
        self.module, self.accumulation = module, accumulation
        settings = deepspeed_config(cfg, optim, micro_batch=micro_batch, accumulation=accumulation)
        if optim is None:
            module.requires_grad_(False).eval()
            self._engine, *_ = deepspeed.initialize(model=module, config=settings)
            return
        module.train()  # gradient checkpointing works in this mode only; dropout is 0 but in adapters
        if cfg.gradient_checkpointing:
            module.lm.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(optim, step, total_steps))
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=settings
        )

    def __call__(self, *args, **kwargs):
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """Count one backward pass; at the end of the accumulation, clip, update and advance the schedule."""
        self._engine.step()

    @property
    def grad_norm(self) -> float:
        """Of the last update, before clipping, over all ranks. NaN at stage 0 in float32: DeepSpeed clips there but
        does not tell."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def lr(self) -> float:
        return self._engine.get_lr()[0]

    def settle(self) -> None:
        """End ZeRO-3's prefetches before weights are read: a pass over a part of the model leaves some under way."""
        if any(hasattr(p, "ds_id") for p in self.module.parameters()):
            self._engine.empty_partition_cache()

    def named_weights(self, lm: nn.Module, **options) -> NamedWeights:
        """Those of `lm`, a part of this engine's module."""
        return NamedWeights(self, lm, **options)

    def save(self, folder: Path) -> None:
        """Weights, optimiser and schedule of every rank, to resume from."""
        self.settle()
        self._engine.save_checkpoint(str(folder), tag="state")

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise RuntimeError(f"no engine state in {folder}; delete it and start the stage anew")


MergeWatch = Callable[[str, Tensor, Tensor, Tensor, float, Tensor], None]
"""Is shown each adapted weight: its name, the base, the adapter's A, B and scaling, and the merged weight."""


class NamedWeights:
    """`named_weights` of an engine's model, as often as wanted, and what they are without gathering them."""

    def __init__(self, owner: Engine, lm: nn.Module, **options):
        self._owner, self._lm, self._options = owner, lm, options

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._owner.settle()
        return named_weights(self._lm, **self._options)

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and whole shape of each, in their order."""
        return [
            (name, weight.dtype, tuple(getattr(weight, "ds_shape", weight.shape)))
            for name, weight, _ in _with_adapters(self._lm)
        ]


def named_weights(
    lm: nn.Module, *, watch: MergeWatch | None = None, values: Mapping[nn.Parameter, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of a causal LM, one at a time, adapters merged in.

    Under ZeRO-3 every rank must run through it, since each tensor is gathered from all.

    Args:
        values: taken in place of these parameters, in the type of the model.
    """
    value = lambda p: (values or {}).get(p, p)  # noqa: E731
    for name, weight, layer in _with_adapters(lm):
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight] if layer else []
        with gathered([weight, *factors]):
            if layer:
                scaling = layer.scaling["default"]
                whole = merged_lora(weight, lora_product(*map(value, factors), scaling).to(weight.device))
                if watch:
                    watch(name, weight, *factors, scaling, whole)
            else:
                whole = value(weight).detach().to(weight.dtype, copy=True)
        yield name, whole


def _with_adapters(lm: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module | None]]:
    """(Hugging Face name, parameter, the adapted layer that it belongs to or None), adapters' own left out."""
    adapted = {f"{name}.weight": layer for name, layer in lora_modules(lm)} if hasattr(lm, "peft_config") else {}
    for name, weight in lm.named_parameters():
        if "lora_" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield name, weight, adapted.get(name)


@contextmanager
def gathered(parameters: list[nn.Parameter]):
    """Whole parameters inside the block, whatever the ZeRO stage; read only."""
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters), torch.no_grad():
            yield
    else:
        with torch.no_grad():
            yield


def deepspeed_config(cfg: config.Engine, optim: config.Optim | None, *, micro_batch: int, accumulation: int) -> dict:
    """The DeepSpeed settings that follow from the configuration; `cfg.overrides` are merged over them."""
    cpu_offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # Stages 1 and 2 shard only what is trained: an engine for inference has nothing to shard there.
    stage = cfg.zero_stage if optim or cfg.zero_stage == 3 else 0
    zero = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 10_000, "overlap_comm": torch.cuda.is_available()}
    if cfg.offload and stage == 3:
        zero["offload_param"] = cpu_offload
    if cfg.offload and stage > 0 and optim:
        zero["offload_optimizer"] = cpu_offload
    settings = {
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


def _schedule(optim: config.Optim, step: int, total: int) -> float:
    """Factor of the learning rate at optimiser step `step` (from 0): linear warm-up, then the schedule."""
    warm = math.ceil(optim.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = min(1.0, (step - warm) / max(1, total - warm))
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        optim.schedule
    ]
