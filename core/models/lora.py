"""LoRA adapters (2106.09685): adding them, and merging them into weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from core.config import Lora
from core.models import CausalLM


def add_lora(lm: CausalLM, lora: Lora) -> CausalLM:
    """`lm` with trainable adapters, drawn with torch's global generator; its own weights are frozen.

    `lora.top_layers` limits them to the top layers.
    """
    from peft import LoraConfig, get_peft_model

    depth = lm.config.num_hidden_layers
    layers = list(range(depth - lora.top_layers, depth)) if lora.top_layers else None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    # float32 adapters on a bf16 base fail under ZeRO-3 (huggingface/trl#6089); the optimiser keeps float32 masters.
    return get_peft_model(lm, config, autocast_adapter_dtype=False)


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
