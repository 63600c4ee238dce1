"""LoRA adapters of this project and of other code: which layers they adapt, whether they fit, how they are merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from core.errors import ArtefactError
from core.files import digest, open_tensors
from core.models import CausalLM
from core.models.architecture import linear_layers, text_config
from core.models.libraries import made_by_library
from core.models.lora import lora_product, merged_lora, out_and_in, out_and_in_features
from core.training.sharding import changed
from rm.checkpoints.folder import faults, files, read_config

SAME_BASE = (
    "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""Settings of the base that a LoRA checkpoint repeats."""
NOT_MERGED = (
    "use_dora", "rank_pattern", "alpha_pattern", "target_parameters", "layer_replication",
    "trainable_token_indices", "lora_bias",
)  # fmt: skip
"""Options of PEFT that change what an adapter computes, and that `merge` does not implement."""


def adapter_config(folder: Path):
    """`adapter_config.json` as PEFT's `LoraConfig`; ArtefactError for options that `merge` does not implement."""
    from peft import LoraConfig, PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise ArtefactError(f"{folder} holds LoRA tensors, but no adapter_config.json with their rank, alpha and base")
    with made_by_library(f"cannot read {folder / 'adapter_config.json'}"):
        adapter = PeftConfig.from_pretrained(str(folder))
    if not isinstance(adapter, LoraConfig):
        raise ArtefactError(f"{folder}: adapter_config.json is of type {adapter.peft_type}, not LORA")
    unknown = [f"{k} = {value!r}" for k in NOT_MERGED if (value := getattr(adapter, k, None))]
    if adapter.bias != "none":
        unknown.append(f"bias = {adapter.bias!r}")
    if unknown:
        raise ArtefactError(f"{folder}: adapter_config.json has options that are not supported: {', '.join(unknown)}")
    return adapter


def check_settings(folder: Path, base: str | Path, keys: Iterable[str]) -> None:
    """ArtefactError with their names if settings of `base` differ from those in `config.json` of its checkpoint."""
    trained, given = text_config(read_config(folder)), text_config(read_config(base))
    pairs = [(key, getattr(trained, key, None), getattr(given, key, None)) for key in keys]
    if other := [f"{key} is {b!r}, not {a!r}" for key, a, b in pairs if a != b]:
        raise ArtefactError(f"{base} is not the base of {folder}: its {', its '.join(other)}")


def adapted(lm: CausalLM, adapter, folder: Path) -> dict[str, nn.Module]:
    """Name -> layer, for the layers that the adapter targets."""
    from peft.tuners.tuners_utils import check_target_module_exists

    kept = adapter.modules_to_save or []
    # For the task type of the GRM authors, PEFT lists `classifier` and `score`, which no causal LM has.
    if whole := [name for name, _ in lm.named_modules() if name.split(".")[-1] in kept]:
        raise ArtefactError(f"{folder}: adapter_config.json has modules_to_save {whole[:3]}, which is not supported")
    adapter.modules_to_save = None
    layers = {
        name: layer
        for name, layer in linear_layers(lm)
        if any(check_target_module_exists(adapter, prefix + name) for prefix in ("", "pretrained_model."))
    }
    tied = lm.get_input_embeddings().weight
    if any(layer.weight is tied for layer in layers.values()):
        raise ArtefactError(f"{folder}: an adapter on the LM head, which is tied to the embeddings, is not supported")
    return layers


def check_factors(
    folder: Path,
    base: str | Path,
    layers: Mapping[str, nn.Module],
    adapter,
    shape_of: Mapping[str, tuple[int, ...]],
    prefix: str = "",
) -> None:
    """ArtefactError with their names for tensors that are missing, extra or of another shape.

    Args:
        shape_of: name of the factor (`prefix` + `LAYER.lora_A.weight` or `LAYER.lora_B.weight`) -> shape.
    """
    wanted = {}
    for name, layer in layers.items():
        out_features, in_features = out_and_in_features(layer)
        wanted[f"{prefix}{name}.lora_A.weight"] = (adapter.r, in_features)
        wanted[f"{prefix}{name}.lora_B.weight"] = (out_features, adapter.r)
    if wrong := faults(wanted, shape_of):
        raise ArtefactError(f"{folder} does not fit its adapter_config.json on {base}: {wrong}")


@torch.no_grad()
def merge(layers: Mapping[str, nn.Module], adapter, factors: Mapping[str, Tensor]) -> None:
    """Add the adapter to the weights of `layers`, in float32, and round once."""
    scaling = adapter.lora_alpha / (adapter.r**0.5 if adapter.use_rslora else adapter.r)
    for name, layer in layers.items():
        a, b = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
        with changed([cast(nn.Parameter, layer.weight)]):
            weight = out_and_in(layer)
            weight.copy_(merged_lora(weight, lora_product(a, b, scaling).to(weight.device)))


def weights_digest(folder: Path) -> str:
    """Digest of the names, types, shapes and first rows of a model's tensors.

    It reads a few MiB of a large model. Fine-tuning, merging an adapter and quantisation change some first row. How the
    tensors are divided into shards does not matter.
    """
    facts = {}
    for file in files(folder):
        with open_tensors(file) as weights:
            for key in weights.keys():  # noqa: SIM118
                part = weights.get_slice(key)
                shape = part.get_shape()
                row = part[:1] if len(shape) > 1 else weights.get_tensor(key)
                numbers = row.flatten().contiguous().view(torch.uint8).numpy().tobytes()
                facts[key] = [part.get_dtype(), shape, hashlib.sha256(numbers).hexdigest()]
    return digest(facts)
