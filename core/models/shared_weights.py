"""Frozen weights that several models have in common, in memory once."""

from __future__ import annotations

import torch
from torch import nn

from core.models import CausalLM
from core.training.sharding import is_divided


class SharedWeights:
    """Makes models hold the same tensor where they have equal frozen weights under one name.

    The models stay modules of their own, each with its own adapters, hooks and engine. Nothing ever writes to a frozen
    weight but a model that is loaded, with the values that it has.

    It is not for models under ZeRO-3. There an engine gathers weights ahead of its passes, and what to wait for is
    known to that engine alone. Another one that needs the same weight would neither gather it nor wait for it.
    """

    def __init__(self) -> None:
        self._held: dict[str, list[nn.Parameter]] = {}

    @torch.no_grad()
    def take(self, lm: CausalLM) -> int:
        """Put weights of earlier models in place of the equal frozen ones of `lm`, and keep its others for later ones.

        Returns:
            The bytes that are not needed any more.
        """
        saved = 0
        for path, module in lm.named_modules():
            path = path.removeprefix("base_model.model.").replace(".base_layer", "")
            for name, weight in module.named_parameters(recurse=False):
                if weight.requires_grad or is_divided(weight) or "lora_" in path:
                    continue
                held = self._held.setdefault(f"{path}.{name}", [])
                same = next((other for other in held if _same(other, weight)), None)
                if same is None:
                    held.append(weight)
                elif same is not weight:
                    module._parameters[name] = same
                    saved += weight.nbytes
        return saved


def _same(one: nn.Parameter, other: nn.Parameter) -> bool:
    if one is other:
        return True
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one, other.to(one.device))
