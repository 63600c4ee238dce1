"""The parts of a causal language model, found by what transformers and the modules tell, not by names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.errors import ArtefactError
from core.models import CausalLM


def text_config(config: Any) -> Any:
    """The configuration of the language model: of a model that reads images too, the section about text."""
    return config.get_text_config(decoder=True)


def max_positions(lm: CausalLM) -> int:
    """The tokens that a sequence may have; `sys.maxsize` where the architecture sets no bound."""
    return getattr(text_config(lm.config), "max_position_embeddings", None) or sys.maxsize


def without_adapters(lm: CausalLM) -> CausalLM:
    """The causal LM of transformers, also where PEFT has wrapped it."""
    return lm.get_base_model() if hasattr(lm, "peft_config") else lm


def trunk_of(lm: CausalLM) -> CausalLM:
    """The module between token ids and LM head; of a model that reads images too, the part that reads text."""
    base = without_adapters(lm)
    trunk = base.get_decoder()
    if trunk is base:  # transformers does not know, as for Llama-4: it is the part with the embeddings
        embeddings = base.get_input_embeddings()
        return next((part for part in base.children() if any(m is embeddings for m in part.modules())), base)
    return trunk


def hidden_size(lm: CausalLM) -> int:
    """Width of the hidden states that the LM head reads.

    That of the embeddings: OPT-350M, for one, is wider inside and projects back.
    """
    width = getattr(lm.get_input_embeddings(), "embedding_dim", None)
    return text_config(lm.config).hidden_size if width is None else width


class Stack(NamedTuple):
    """The list of layers of a trunk, by the module that holds it."""

    owner: nn.Module
    name: str

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.owner, self.name)


def stack_of(trunk: CausalLM) -> Stack:
    """Where `trunk` keeps its layers.

    Raises:
        ArtefactError: it has no list of as many layers as its configuration says.
    """
    depth = text_config(trunk.config).num_hidden_layers
    modules = [trunk]
    for module in modules:  # level by level; mostly the trunk itself holds them, so that no other module is looked at
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return Stack(module, name)
            modules.append(child)
    raise ArtefactError(f"{_name(trunk)}: no list of {depth} layers was found in its {type(trunk).__name__}")


def layers_of(lm: CausalLM) -> nn.ModuleList:
    """The layers of `lm`, from the lowest on."""
    return stack_of(trunk_of(lm)).layers


def linear_layers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name inside the layer, module) of every linear map in a layer; GPT-2's `Conv1D` is one too."""
    from transformers.pytorch_utils import Conv1D

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


class Surroundings(NamedTuple):
    """Names of the modules beside the layers, in the module that holds them."""

    below: list[str]
    """Run before the first layer: embeddings of tokens and of positions, projections, rotary frequencies."""
    above: list[str]
    """Run after the last layer: the final norm, in OPT-350M also a projection."""


@torch.no_grad()
def surroundings(lm: CausalLM, run: Callable[[Tensor, Tensor], object]) -> Surroundings:
    """What runs before and after the layers of `lm`, seen in a pass over four tokens.

    Args:
        run: passes (ids, mask), both [1, L], through the trunk of `lm`.
    """
    stack = stack_of(trunk_of(lm))
    names: tuple[list[str], list[str]] = ([], [])
    passed = False

    def last_layer(*_: object) -> None:
        nonlocal passed
        passed = True

    def note(name: str) -> Callable[..., None]:
        return lambda *_: names[passed].append(name)

    beside = [(name, child) for name, child in stack.owner.named_children() if name != stack.name]
    hooks = [child.register_forward_hook(note(name)) for name, child in beside]
    hooks.append(stack.layers[-1].register_forward_hook(last_layer))
    try:
        ids = torch.arange(4, device=next(lm.parameters()).device)[None]
        run(ids, torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return Surroundings(*(list(dict.fromkeys(part)) for part in names))


def _name(lm: CausalLM) -> str:
    return lm.config.name_or_path or lm.config.model_type
