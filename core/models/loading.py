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
from core.files import read_json, write_json
from core.models import CausalLM
from core.models.agreement import check_agreement, skip_padding
from core.models.architecture import stack_of, text_config, trunk_of
from core.models.kernels import attention_kernel, soft_cap
from core.models.libraries import made_by_library
from core.models.logits import use_float32_head
from core.models.tensor_by_tensor import read_in_shards
from core.models.weight_files import SHARD_BYTES, write_weights
from core.training.sharding import Shards


def load_causal_lm(
    model: Model, *, dtype: str, num_layers: int | None = None, float32_head: bool = False,
    shards: Shards | None = None,
) -> CausalLM:  # fmt: skip
    """A causal language model, with dropout off. What does not read text, such as a vision tower, is frozen.

    Args:
        dtype: of its weights, for example "bfloat16".
        num_layers: how many layers to keep, from the lowest on; None for all.
        float32_head: compute logits in float32 (`core.models.logits.Float32Head`) where weights are of another type.
        shards: divides the weights among the ranks while they are read (`core.training.engine.shards`); None reads them
            whole. Every rank must make the call.

    Raises:
        ArtefactError: the model has fewer layers; its files and its architecture do not fit each other; the attention
            kernel computes something else than the architecture says; or log-probs computed here are not the model's.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with made_by_library(f"cannot read the configuration of {model.path}"):
        config = AutoConfig.from_pretrained(model.path, **where)
        depth = text_config(config).num_hidden_layers
        if num_layers is not None:
            _cut(text_config(config), num_layers, model.path)
    with made_by_library(f"no model can be made of {model.path}"):
        options = {
            "dtype": getattr(torch, dtype),
            "attn_implementation": attention_kernel(config, model.attention, model.path),
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # refused below, by name
        }
        try:
            if shards:
                lm, info = read_in_shards(shards, model, config, **options)
            else:
                lm, info = AutoModelForCausalLM.from_pretrained(model.path, config=config, **options, **where)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{model.path}: its weights are damaged, cut short or not there ({error})") from None
        except ValueError as error:
            if "attn_implementation" not in str(error):
                raise
            raise ArtefactError(
                f"{model.path} cannot be run with the attention kernel {model.attention}: set attention to auto "
                f"({error})"
            ) from None
    stack = stack_of(trunk_of(lm))
    cut = tuple(f".{stack.name}.{i}." for i in range(len(stack.layers), depth))
    unexpected = [k for k in info["unexpected_keys"] if not any(layer in f".{k}" for layer in cut)]
    if info["missing_keys"] or unexpected or info["mismatched_keys"]:
        raise ArtefactError(
            f"{model.path} does not fit its architecture: missing {sorted(info['missing_keys'])[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}, other shape {sorted(info['mismatched_keys'])[:3]}"
        )
    if shards:
        shards.take(lm)
    without_dropout(lm)
    if float32_head and dtype != "float32":
        use_float32_head(lm)
    with made_by_library(f"{model.path}: its model cannot be run"):
        check_agreement(lm)
        skip_padding(lm)
    reads_text = {id(p) for module in (trunk_of(lm), lm.get_output_embeddings()) for p in module.parameters()}
    for parameter in lm.parameters():
        parameter.requires_grad_(id(parameter) in reads_text)
    return lm


def _cut(config, num_layers: int, path: str) -> None:
    """Keep the lowest layers in the configuration, and in its lists of one entry a layer."""
    depth = config.num_hidden_layers
    if num_layers > depth:
        raise ArtefactError(f"num_layers {num_layers} exceeds the {depth} layers of {path}")
    for key, value in config.to_dict().items():  # the kind of attention of each layer (Qwen, Gemma), for example
        if "layer" in key and isinstance(value, list) and len(value) == depth:
            setattr(config, key, value[:num_layers])
    config.num_hidden_layers = num_layers


def without_dropout(lm: CausalLM) -> None:
    """Switch off dropout: the modules, and the numbers that attention kernels and layers apply themselves."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)


def save_lm(
    folder: Path, config, named_weights: Iterable[tuple[str, Tensor]], tokenizer: ChatTokenizer, *,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a folder that transformers and vLLM load as it is.

    Args:
        config: of the model, in transformers' form.
        named_weights: (Hugging Face name, whole tensor); a tied LM head is left out.
        shard_bytes: as in `core.models.weight_files.write_weights`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = config.tie_word_embeddings
    weights = ((k, v) for k, v in named_weights if not (tied and k == "lm_head.weight"))
    write_weights(folder, weights, shard_bytes)
    save_config(folder, config)
    save_tokenizer(folder, tokenizer)


def save_config(folder: Path, config) -> None:
    """Write config.json; where the default kernel would leave a cap on attention scores out, it names the kernel."""
    config.save_pretrained(folder)
    if soft_cap(config) is not None:
        file = folder / "config.json"
        write_json(file, read_json(file) | {"attn_implementation": config._attn_implementation})
