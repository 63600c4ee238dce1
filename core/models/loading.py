"""Loading and saving causal language models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config import Model
from core.data.chat import ChatTokenizer
from core.data.tokenizer_files import save_tokenizer
from core.errors import ArtefactError
from core.models import CausalLM


def load_causal_lm(model: Model, *, dtype: str, num_layers: int | None = None) -> CausalLM:
    """A causal language model, with dropout off.

    Args:
        dtype: of its weights, for example "bfloat16".
        num_layers: how many layers to keep, from the lowest on; None for all.

    Raises:
        ArtefactError: the model has fewer layers, or its files and its architecture do not fit each other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config = AutoConfig.from_pretrained(model.path, **where)
    depth = config.num_hidden_layers
    if num_layers is not None:
        if num_layers > depth:
            raise ArtefactError(f"num_layers {num_layers} exceeds the {depth} layers of {model.path}")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):  # the kind of attention of each layer (Qwen, Gemma)
            config.layer_types = config.layer_types[:num_layers]
    lm, info = AutoModelForCausalLM.from_pretrained(
        model.path,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=model.attention,
        output_loading_info=True,
        **where,
    )
    cut = tuple(f".layers.{i}." for i in range(config.num_hidden_layers, depth))
    unexpected = [k for k in info["unexpected_keys"] if not any(layer in k for layer in cut)]
    if info["missing_keys"] or unexpected or info["mismatched_keys"]:
        raise ArtefactError(
            f"{model.path} does not fit its architecture: missing {sorted(info['missing_keys'])[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}, other shape {sorted(info['mismatched_keys'])[:3]}"
        )
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):  # a number, applied inside the attention kernels
            module.attention_dropout = 0.0
    return lm


def save_lm(folder: Path, config, named_weights: Iterable[tuple[str, Tensor]], tokenizer: ChatTokenizer) -> None:
    """Write a folder that transformers and vLLM load as it is.

    Args:
        config: of the model, in transformers' form.
        named_weights: (Hugging Face name, whole tensor); a tied LM head is left out.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tied = config.tie_word_embeddings
    weights = {k: v.contiguous().cpu() for k, v in named_weights if not (tied and k == "lm_head.weight")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
