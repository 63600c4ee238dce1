"""Weights by name, gathered from ZeRO-3 partitions one at a time; saving adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.files import read_json, write_json
from core.models import CausalLM
from core.models.lora import is_conv1d, lora_modules, lora_product, merged_lora
from core.training import distributed
from core.training.sharding import gathered, whole_shape


def save_adapter(folder: Path, lm: CausalLM) -> None:
    """Write the trained adapter as a folder of PEFT. Every rank must call it; the first one writes."""
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
        # PEFT writes a set in the order of this process: equal adapters would have other digests.
        about = read_json(file := folder / "adapter_config.json")
        write_json(file, {key: sorted(x) if key == "target_modules" and isinstance(x, list) else x
                          for key, x in about.items()})  # fmt: skip


def trained_weights(module: nn.Module, rank: int) -> dict[str, Tensor]:
    """The whole trained weights of a module by their names in it, as one rank has them, on its CPU; nothing on others.

    Every rank must call it.
    """
    found = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            with gathered([weight]):
                if distributed.rank() == rank:
                    found[name] = weight.detach().cpu().contiguous().clone()
    return found


MergeWatch = Callable[[str, Tensor, Tensor, Tensor, float, Tensor], None]
"""Called with each adapted weight: its name, the base weight, the adapter's A, B and scaling, the merged weight."""


class NamedWeights:
    """The `named_weights` of an engine's model: each iteration gathers them again.

    Args:
        settle: called before weights are read; `Engine.settle`.
        options: of `named_weights`.
    """

    def __init__(self, lm: CausalLM, settle: Callable[[], None], **options):
        self._lm, self._settle, self._options = lm, settle, options

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._settle()
        return named_weights(self._lm, **self._options)

    def take_part(self) -> None:
        """Iterate for the sake of another rank, which needs this one's shards; nothing is kept."""
        for _ in self:
            pass

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, type, whole shape) of each weight in the order of iteration, without gathering any."""
        return [(name, weight.dtype, whole_shape(weight)) for name, weight, _ in _with_adapters(self._lm)]


def named_weights(
    lm: CausalLM, *, watch: MergeWatch | None = None, values: Mapping[nn.Parameter, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of every weight of a causal LM, with adapters merged in.

    Under ZeRO-3 every rank must iterate to the end, since each tensor is gathered from all ranks.

    Args:
        watch: called with each adapted weight.
        values: tensors to use in place of these parameters; the results have the type of the model.
    """
    value = lambda p: (values or {}).get(p, p)  # noqa: E731
    for name, weight, layer in _with_adapters(lm):
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight] if layer else []
        with gathered([weight, *factors]):
            if layer:
                scaling = layer.scaling["default"]
                a, b = factors
                turned = is_conv1d(layer.get_base_layer())
                base = weight.T if turned else weight
                whole = merged_lora(base, lora_product(value(a), value(b), scaling).to(base.device))
                if watch:
                    watch(name, base, a, b, scaling, whole)
                whole = whole.T if turned else whole
            else:
                whole = value(weight).detach().to(weight.dtype, copy=True)
        yield name, whole


def _with_adapters(lm: CausalLM) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """(Hugging Face name, parameter, its adapted layer or None) of every weight that is not an adapter's own."""
    adapted = {f"{name}.weight": layer for name, layer in lora_modules(lm)} if hasattr(lm, "peft_config") else {}
    for name, weight in lm.named_parameters():
        if "lora_" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield name, weight, adapted.get(name)
