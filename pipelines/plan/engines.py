"""Which ZeRO stage the engines of a run have, for a machine that need not be this one."""

from __future__ import annotations

from core.config import Engine
from core.training.engine import FROZEN_SHARE


def frozen_zero(settings: Engine, together: float, gpu_memory: float | None) -> int:
    """The stage of models that are not trained, 0 or 3, by the rule of `core.training.engine.frozen_zero_stage`.

    Args:
        together: bytes of all that a rank would hold.
        gpu_memory: bytes of a GPU; None on CPU.
    """
    if settings.frozen_zero_stage != "auto":
        return settings.frozen_zero_stage
    if settings.zero_stage < 3 or not (settings.offload or gpu_memory):
        return 0
    return 3 if settings.offload or together > FROZEN_SHARE * (gpu_memory or 0.0) else 0
