"""Weights by name, gathered from ZeRO-3 partitions one at a time; saving of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from core.models.lora import lora_modules, lora_product, merged_lora
from core.training import distributed


def save_adapter(folder: Path, lm: nn.Module) -> None:
    """The trained adapter as peft's own folder; every rank must call it, the first writes."""
    from safetensors.torch import save_file

    adapter = {}
    for name, weight in lm.named_parameters():
        if "lora_" in name:
            with gathered([weight]):
                adapter[name.replace(".default.", ".")] = weight.detach().cpu().contiguous().clone()
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        lm.peft_config["default"].save_pretrained(folder)


MergeWatch = Callable[[str, Tensor, Tensor, Tensor, float, Tensor], None]
"""Is shown each adapted weight: its name, the base, the adapter's A, B and scaling, and the merged weight."""


class NamedWeights:
    """`named_weights` of an engine's model, as often as wanted, and what they are without gathering them."""

    def __init__(self, lm: nn.Module, settle: Callable[[], None], **options):
        """`settle` is called before weights are read: `Engine.settle`."""
        self._lm, self._settle, self._options = lm, settle, options

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._settle()
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
