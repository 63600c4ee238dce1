"""Letting go of a model that is trained, so that the next one of the same process has its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def release(deepspeed_engine: Any, module: nn.Module) -> None:
    """Take away what DeepSpeed keeps a module by to the end of the process: hooks, and two things of ZeRO-3's.

    `DeepSpeedEngine.destroy` takes the hooks away. It leaves the module in a list of modules that are being run, and in
    a cache of one of its methods that all engines have in common.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    deepspeed_engine.destroy()
    FWD_MODULE_STACK[:] = [run for run in FWD_MODULE_STACK if run is not module]
    for method in vars(Coordinator).values():
        for cache in _within(method):
            if hasattr(cache, "cache_clear"):
                cache.cache_clear()


def _within(method: Callable) -> Iterator[Any]:
    """A method, and what it wraps."""
    yield method
    for cell in getattr(method, "__closure__", None) or ():
        yield cell.cell_contents
