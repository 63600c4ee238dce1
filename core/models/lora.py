"""LoRA adapters (2106.09685): adding them, and merging them into weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from core.config import Lora, Model
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.architecture import layers_of, linear_layers, stack_of, trunk_of
from core.models.libraries import made_by_library
from core.training.sharding import whole_shape

DEFAULT_TARGETS = Lora().targets


def add_lora(lm: CausalLM, lora: Lora) -> CausalLM:
    """`lm` with trainable adapters, drawn with torch's global generator; its own weights are frozen.

    `lora.top_layers` limits them to the top layers.

    Raises:
        ArtefactError: the layers have no linear map of a name in `lora.targets`.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(lm, lora)
    stack = stack_of(trunk_of(lm))
    depth = len(stack.layers)
    top: list[int] | None = list(range(depth - lora.top_layers, depth)) if lora.top_layers else None
    inside = {id(module) for layer in stack.layers for module in layer.modules()}
    fits = lambda name: any(name == t or name.endswith(f".{t}") for t in targets)  # noqa: E731
    if any(fits(name) and id(module) not in inside for name, module in lm.named_modules()):
        # A vision tower has layers of the same names: whole names instead.
        names = {id(module): name for name, module in lm.named_modules()}
        chosen = stack.layers if top is None else stack.layers[-len(top) :]
        targets = [names[id(m)] for layer in chosen for name, m in linear_layers(layer) if fits(name)]
        top = None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=top,
        fan_in_fan_out=any(is_conv1d(module) for _, module in linear_layers(stack.layers[0])),
        task_type="CAUSAL_LM",
    )
    # float32 adapters on a bf16 base fail under ZeRO-3 (huggingface/trl#6089); the optimiser keeps float32 masters.
    return get_peft_model(lm, config, autocast_adapter_dtype=False)


def lora_targets(lm: CausalLM, lora: Lora) -> list[str]:
    """Names of the linear layers that get adapters.

    Those of `lora.targets`. Where these are the default, and the architecture has other names than those of Llama, all
    linear layers of its layers, which is what the default stands for.

    Raises:
        ArtefactError: a name that no linear map of the layers has.
    """
    paths = {name for layer in layers_of(lm) for name, _ in linear_layers(layer)}
    names = {path.rpartition(".")[2] for path in paths}
    absent = [t for t in lora.targets if not any(p == t or p.endswith(f".{t}") for p in paths)]
    if absent and lora.targets == DEFAULT_TARGETS:
        return sorted(names)
    if absent:
        raise ArtefactError(
            f"lora.targets {absent}: the layers of {lm.config.name_or_path} ({lm.config.model_type}) have no linear "
            f"map of that name; they have {', '.join(sorted(names))}"
        )
    return list(lora.targets)


def named_targets(model: Model, lora: Lora) -> Lora:
    """`lora` with the names that its targets stand for in this architecture; no weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with made_by_library(f"no model can be made of {model.path}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(model.path, **where)
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    return lora.model_copy(update={"targets": tuple(lora_targets(lm, lora))})


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear map of GPT-2, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def out_and_in(module: nn.Module) -> Tensor:
    """The weight of a linear map as [out, in], a view of its own."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight


def out_and_in_features(module: nn.Module) -> tuple[int, int]:
    """The shape of a linear map's weight as [out, in], divided among the ranks or not."""
    one, other = whole_shape(module.weight)  # type: ignore[arg-type]
    return (other, one) if is_conv1d(module) else (one, other)


def lora_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * B A [out, in] in float32: what an adapter with factors A [rank, in], B [out, rank] adds to a weight."""
    return scaling * (b.float() @ a.float())


def merged_lora(base: Tensor, product: Tensor) -> Tensor:
    """W + product in float32, rounded once to the type of W [out, in]."""
    return (base.float() + product).to(base.dtype)


def lora_modules(lm: CausalLM) -> Iterator[tuple[str, nn.Module]]:
    """(name in the base model, adapted linear layer) of every adapted layer."""
    from peft.tuners.lora import LoraLayer

    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module
