"""What an optimiser needs in its steps alone, in host memory between them: float32 weights and Adam's two moments.

DeepSpeed does so itself at stages 1 and 2. At stage 3 it refuses for every optimiser but its own FusedAdam, which has
to be compiled, although nothing in it depends on that: what it would do is done here.
"""

from __future__ import annotations

from typing import Any

import torch


def offload(engine: Any) -> None:
    """Move these states of a DeepSpeed engine at stage 1, 2 or 3 from this rank's GPU to pinned host memory.

    Until `reload` the engine must not step. Passes with or without gradients need none of it.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as States
    from deepspeed.runtime.zero.offload_states import offload_optimizer_states

    if engine.zero_optimization_stage() < 3:
        engine.offload_states(include=[States.hp_params, States.optim_states])
        return
    sharded, gpu = engine.optimizer, get_accelerator()
    sharded.empty_partition_cache()
    for weights in sharded.fp32_partitioned_groups_flat:
        weights.data = gpu.pin_empty_like(weights.data, device="cpu").copy_(weights.data)
    offload_optimizer_states(sharded.optimizer, "cpu", pin_memory=True)
    if gpu.is_available():
        gpu.empty_cache()


def reload(engine: Any, device: torch.device) -> None:
    """Move back to `device` what `offload` took away."""
    from deepspeed.runtime.zero.offload_states import reload_optimizer_states

    if engine.zero_optimization_stage() < 3:
        engine.reload_states()
        return
    for weights in engine.optimizer.fp32_partitioned_groups_flat:
        weights.data = weights.data.to(device)
    reload_optimizer_states(engine.optimizer.optimizer, device)
