"""Models that ZeRO-3 divides among the ranks while they are read, so that no rank ever holds one whole.

DeepSpeed can divide a parameter before there is an engine. Until an engine takes such a model over, a pass through it,
as the checks make that follow its loading, gathers the parameters of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from core.models import CausalLM
from core.models.architecture import layers_of
from core.training.distributed import device

_HANDLES = "_gathering"
"""Attribute of a module whose parameters are gathered for each pass: what ends that."""


class Shards:
    """Divides parameters among the ranks. All ranks must read the same models in the same order.

    Args:
        settings: of DeepSpeed, for an engine at stage 3.
    """

    def __init__(self, settings: dict[str, Any]):
        self._settings = settings
        self._convert: Callable[..., None] | None = None

    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep this rank's share of each of these parameters, by the values of the first rank."""
        import deepspeed

        for parameter in parameters:
            if is_divided(parameter):
                continue
            if self._convert is None:  # it is DeepSpeed that adds the method to each parameter which it has divided
                # One of no model, since all that are divided later hold on to the first.
                holder = nn.Module()
                holder.first = nn.Parameter(torch.zeros(1, dtype=parameter.dtype))
                deepspeed.zero.Init(module=holder, config_dict_or_path=self._settings)
                self._convert = holder.first.convert_to_zero_parameters  # type: ignore[attr-defined]
            self._convert(param_list=[parameter])

    @contextmanager
    def reading(self, whole: set[tuple[int, ...]]) -> Iterator[None]:
        """Inside the block transformers' loader hands each parameter to its module, which divides it at once.

        Args:
            whole: shapes of parameters that stay whole, because the loader compares them at the end.
        """

        def divide(_: nn.Module, __: str, parameter: nn.Parameter) -> None:
            # Weights that are missing in the files come without this mark. The loader initialises them, and our own
            # checks refuse them.
            is_read = getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta
            if is_read and tuple(parameter.shape) not in whole:
                self.divide([parameter])

        handle = register_module_parameter_registration_hook(divide)
        try:
            yield
        finally:
            handle.remove()

    def take(self, lm: CausalLM) -> None:
        """Divide what is still whole, and let passes through `lm` gather its layers one by one."""
        self.divide(lm.parameters())
        lm.to(device())  # the buffers
        layers = list(layers_of(lm))
        inside = {id(part) for layer in layers for part in layer.modules()}
        for layer in layers:
            _gather_in_passes(layer, recurse=True)
        for part in lm.modules():
            if id(part) not in inside and next(part.parameters(recurse=False), None) is not None:
                _gather_in_passes(part, recurse=False)


def is_divided(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has divided this parameter among the ranks."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, wherever its parts are."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def num_bytes(module: nn.Module) -> int:
    """Of the whole parameters, each counted once."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())


def _gather_in_passes(module: nn.Module, *, recurse: bool) -> None:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    running: list[Any] = []

    def gather(*_: object) -> None:
        parts = [p for p in module.parameters(recurse) if is_divided(p)]
        absent = [p for p in parts if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]  # type: ignore[attr-defined]
        running.append(deepspeed.zero.GatheredParameters(absent))
        running[-1].__enter__()

    def release(*_: object) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    before, after = module.register_forward_pre_hook(gather), module.register_forward_hook(release, always_call=True)
    module.__dict__[_HANDLES] = (before, after)


def taken_over(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a model was divided while it was read. It is then made ready for its engine, which gathers by itself.

    What was added to the model since, such as a head, gets the type and the place that the engine would give it. The
    engine itself would look at neither, where it finds parameters that are divided.
    """
    if not any(map(is_divided, module.parameters())):
        return False
    for part in module.modules():
        for handle in part.__dict__.pop(_HANDLES, ()):
            handle.remove()
    module.to(device())
    for parameter in module.parameters():
        if parameter.is_floating_point():
            cast(parameter, dtype)
    return True


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parameter another number type, divided or not."""
    parameter.data = parameter.data.to(dtype)
    if is_divided(parameter):
        share: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        share.data = share.data.to(dtype)


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters are whole, whatever the ZeRO stage. They must only be read."""
    with _whole(parameters, None):
        yield


@contextmanager
def changed(parameters: list[nn.Parameter]) -> Iterator[None]:
    """As `gathered`, to write to them: all ranks must write the same."""
    with _whole(parameters, 0):
        yield


@contextmanager
def _whole(parameters: list[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
    if any(map(is_divided, parameters)):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank), torch.no_grad():
            yield
    else:
        with torch.no_grad():
            yield
