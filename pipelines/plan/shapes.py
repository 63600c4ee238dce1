"""The sizes of a language model, from its configuration alone: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from core.config import Lora, Model
from core.errors import ConfigError
from core.models.architecture import layers_of, linear_layers, text_config
from core.models.lora import lora_targets, out_and_in

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "google/gemma-2b-it": ("gemma", dict(
        vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256)),
    "google/gemma-2-2b-it": ("gemma2", dict(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256)),
    "mistralai/Mistral-7B-Instruct-v0.2": ("mistral", dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8)),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8)),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True)),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", dict(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, tie_word_embeddings=True)),
    "meta-llama/Llama-3.1-70B-Instruct": ("llama", dict(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8)),
    "Qwen/Qwen3-4B": ("qwen3", dict(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)),
    "EleutherAI/pythia-1.4b": ("gpt_neox", dict(
        vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16)),
    "EleutherAI/pythia-70m": ("gpt_neox", dict(
        vocab_size=50304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8)),
}  # fmt: skip
"""Models that the shipped configurations and the papers use: type and sizes as their own config.json has them. With
these a plan needs neither the hub nor a licence."""
ALIKE = {
    "Ray2333/reward-model-Mistral-7B-instruct-Unified-Feedback": "mistralai/Mistral-7B-Instruct-v0.2",
    "Ray2333/GRM-llama3-8B-sftreg": "meta-llama/Meta-Llama-3-8B-Instruct",
    "tlc4418/pythia_1.4b_sft_policy": "EleutherAI/pythia-1.4b",
    "tlc4418/pythia_70m_sft": "EleutherAI/pythia-70m",
}
"""Hub id -> the model that it was made from."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Numbers of parameters are counted, not computed from widths."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layer_params: int
    """Of one layer."""
    linear_params: int
    """Of the linear maps of one layer; the others are norms and biases."""
    other_params: int
    """Outside the layers: embeddings, the final norm, the LM head where it is not tied."""
    tied: bool
    """The LM head is the embedding."""
    intermediate: int = 0
    """Width inside the MLP."""
    maps: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Linear maps of one layer by name -> (out, in)."""
    adapted: tuple[str, ...] = ()
    """Names of the maps that get an adapter by the default of `Lora.targets`."""
    source: str = "config.json"

    @property
    def params(self) -> int:
        return self.layers * self.layer_params + self.other_params

    @property
    def head_params(self) -> int:
        """Of the LM head, whether or not it has weights of its own."""
        return self.vocabulary * self.hidden

    @property
    def embedding_params(self) -> int:
        """Of the embedding and what else stands outside the layers, without an LM head of its own."""
        return self.other_params - (0 if self.tied else self.head_params)

    @property
    def trunk_params(self) -> int:
        """Of a model that gives rewards or values alone, which is held without an LM head of its own."""
        return self.layers * self.layer_params + self.embedding_params

    def cut(self, layers: int | None) -> Shape:
        """With the lowest `layers` layers only; None keeps all."""
        return self if layers is None else replace(self, layers=min(layers, self.layers))

    def lora_params(self, lora: Lora) -> int:
        """Parameters of the adapters: rank x (in + out) for each adapted map."""
        names = set(self.adapted) if lora.targets == Lora().targets else set(lora.targets)
        maps = [size for name, size in self.maps.items() if name in names]
        return lora.rank * sum(map(sum, maps)) * min(lora.top_layers or self.layers, self.layers)


def shape_of(model: Model) -> Shape:
    """The sizes of a model: of a local folder, of those in `PUBLISHED`, else of the hub.

    Raises:
        ConfigError: its config.json cannot be read.
    """
    from transformers import AutoConfig

    name = ALIKE.get(model.path, model.path)
    if name in PUBLISHED and not Path(model.path).is_dir():
        kind, sizes = PUBLISHED[name]
        return measured(AutoConfig.for_model(kind, **sizes), model.path, "sizes as published")
    try:
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model.path}: its config.json cannot be read, so its work cannot be counted ({str(error)[:200]}); give a "
            f"local folder that holds config.json, or one of {', '.join(PUBLISHED)}"
        ) from None
    return measured(config, model.path, "config.json")


def measured(config: Any, name: str, source: str) -> Shape:
    """The sizes of an architecture, counted on a model without storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    layers, text = layers_of(lm), text_config(config)
    maps = {path.rpartition(".")[2]: tuple(out_and_in(module).shape) for path, module in linear_layers(layers[0])}
    parameters = {id(p): p.numel() for p in lm.parameters()}
    inside = sum(p.numel() for p in layers.parameters())
    heads = text.num_attention_heads
    return Shape(
        name=name,
        layers=len(layers),
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        layer_params=inside // len(layers),
        linear_params=sum(out_and_in(m).numel() for layer in layers for _, m in linear_layers(layer)) // len(layers),
        other_params=sum(parameters.values()) - inside,
        tied=bool(config.tie_word_embeddings),
        intermediate=getattr(text, "intermediate_size", 0) or 4 * text.hidden_size,
        maps={name: (size[0], size[1]) for name, size in maps.items()},
        adapted=tuple(lora_targets(lm, Lora())),
        source=source,
    )
