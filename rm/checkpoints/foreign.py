"""Reading of reward models that other code wrote; a missing, extra or misshapen tensor is an error that names it.

The layout follows from the tensor names in the safetensors files (`adapter_model.safetensors`, `model.safetensors` or
its shards):

1. LoRA of the GRM authors' code (arXiv 2406.10216). Their trainer saves the trainable weights of the wrapped model
   and removes `pretrained_model.` from the names, so adapter and head are in one file:
   `model.layers.0.self_attn.q_proj.lora_A.default.weight`, `v_head.summary.0.weight`. Names with PEFT's own prefix
   (`base_model.model.`), with `pretrained_model.`, or without `.default` are read too. `adapter_config.json` has
   rank, alpha, targets and the base; `config.json` is that of the base with `vhead_*` added.
2. Full models: `model.*`, `v_head.summary.*`, and `lm_head.weight` in some (their published class has none).
3. Sequence classifiers with one label: `model.*`, `score.weight`.

`v_head.summary` is Linear(H, 1) with bias, or `vhead_num_layers` x [Linear(., neurons), ReLU] and Linear(neurons, 1).
Its dropout is off here. The reward is read at the last real token of the attention mask, never by pad id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config import NATIVE_DTYPE, Attention, Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.loading import load_causal_lm
from rm.checkpoints.folder import check_vocabulary, faults, locate, read_config, shapes, tensors, tokens_from
from rm.checkpoints.layout import Parts
from rm.checkpoints.lora import SAME_BASE, adapted, adapter_config, check_factors, check_settings, merge
from rm.heads import make_head

V_HEAD = "v_head.summary."
SCORE = "score."


class AbsentLmHead(nn.Module):
    """In place of an LM head that a checkpoint does not have; computing log-probs with it is an ArtefactError."""

    out_features = 1  # the size of no vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        raise ArtefactError("this reward model was saved without an LM head: it has rewards, but no log-probs")


def has_lm_head(lm: CausalLM) -> bool:
    return not isinstance(lm.get_output_embeddings(), AbsentLmHead)


def read(
    path: str | Path, *, dtype: str = NATIVE_DTYPE, attention: Attention = "sdpa", base: str | Path | None = None
) -> Parts:
    """The parts of a reward model in one of the layouts above, its trunk in `dtype`, its head in float32.

    Args:
        path: a folder or a hub id.
        base: for LoRA, a folder or hub id that replaces the one in `adapter_config.json`.

    Raises:
        ArtefactError: another layout; tensors that do not fit; another base; another vocabulary; pickles only.
        DataError: a tokenizer that `ChatTokenizer` refuses.
    """
    folder = locate(path)
    shape_of = shapes(folder)
    config = read_config(folder)
    names = {_plain(key): key for key in shape_of}
    prefix = V_HEAD if any(key.startswith("v_head.") for key in names) else SCORE
    lora = any(".lora_" in key for key in names)
    if not any(key.startswith(prefix) for key in names):
        top = ", ".join(sorted({key.split(".")[0] for key in names}))
        more = "it is an adapter alone" if lora else "encoder classifiers are not supported"
        raise ArtefactError(f"{folder}: {V_HEAD}* and {SCORE}weight are missing ({more}; it holds {top})")
    if lora:
        lm, tokenizer = _read_lora(folder, names, shape_of, base=base, dtype=dtype, attention=attention)
    elif base is not None:
        raise ArtefactError(f"{folder} is not a LoRA checkpoint, so it cannot be put on the base {base}")
    else:
        tokenizer = ChatTokenizer(Model(path=str(folder)))
        check_vocabulary(folder, tokenizer)
        lm = _read_lm(folder, shape_of, dtype, attention)
    kind = _authors_head(folder, config) if prefix == V_HEAD else "linear"
    # Written by `rm.tools.export`; for other models the scale is not known.
    mean, std = getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
    heads = {key: name for key, name in names.items() if _is_head(key)}
    wanted = make_head(kind, lm.config.hidden_size).state_dict()
    head = _head_weights(wanted, tensors(folder, heads), prefix, f"{folder} does not fit a {kind} head")
    return Parts(lm, kind, head, tokenizer, mean, std)


def _plain(key: str) -> str:
    """The name in the causal LM or the head, without the prefixes of wrappers."""
    while (shorter := key.removeprefix("base_model.model.").removeprefix("pretrained_model.")) != key:
        key = shorter
    return re.sub(r"(\.lora_[AB])\.default\.", r"\1.", key)


def _is_head(key: str) -> bool:
    return key.startswith(("v_head.", SCORE))


def _authors_head(folder: Path, config) -> str:
    """The kind of head as `make_head` names it; missing settings have the defaults of the authors' code."""
    if getattr(config, "vhead_num_output", 1) != 1:
        raise ArtefactError(f"{folder}: vhead_num_output is {config.vhead_num_output}, but a reward is one number")
    if getattr(config, "vhead_layer_type", "mlp") == "linear":
        return "linear_bias"
    neurons, layers = getattr(config, "vhead_num_neurons", 1024), getattr(config, "vhead_num_layers", 1)
    return "mlp" if (neurons, layers) == (1024, 1) else f"mlp:{neurons}x{layers}"


def _head_weights(
    wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], prefix: str, what: str
) -> dict[str, Tensor]:
    shapes_wanted = {prefix + key: tuple(tensor.shape) for key, tensor in wanted.items()}
    if wrong := faults(shapes_wanted, {key: tuple(tensor.shape) for key, tensor in weights.items()}):
        # The authors' training script always builds 1024 neurons, but writes the value of `--num_neurons`.
        hint = "; `vhead_*` in config.json must be that of the trained head" if prefix == V_HEAD else ""
        raise ArtefactError(f"{what}: {wrong}{hint}")
    return {key.removeprefix(prefix): tensor.float() for key, tensor in weights.items()}


def _read_lm(folder: Path, shape_of: Mapping[str, tuple], dtype: str, attention: Attention) -> CausalLM:
    """The trunk with its LM head: the one in the files, the tied one, or an `AbsentLmHead`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of "unexpected" heads; what does not fit is reported below
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=False,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    lm_head = next(f"{name}.weight" for name, m in lm.named_modules() if m is lm.get_output_embeddings())
    wrong = [f"{key} is missing" for key in sorted(set(info["missing_keys"]) - {lm_head})]
    wrong += [f"{key} is extra" for key in sorted(info["unexpected_keys"]) if not _is_head(key)]
    wrong += [f"{k} is {list(has)}, not {list(needs)}" for k, has, needs in sorted(info["mismatched_keys"])]
    if wrong:
        raise ArtefactError(f"{folder} does not fit its config.json: {', '.join(wrong[:6])}")
    # The embeddings of a classifier were never an LM head, even if its configuration still ties the two.
    tied = lm.config.tie_word_embeddings and f"{SCORE}weight" not in shape_of
    if lm_head not in shape_of and not tied:
        lm.set_output_embeddings(AbsentLmHead())
        lm.config.tie_word_embeddings = False
    return lm


def _read_lora(
    folder: Path,
    names: Mapping[str, str],
    shape_of: Mapping[str, tuple],
    *,
    base: str | Path | None,
    dtype: str,
    attention: Attention,
) -> tuple[CausalLM, ChatTokenizer]:
    """The base with the adapter merged in float32 (rounded once to `dtype`), and the checkpoint's tokenizer."""
    adapter = adapter_config(folder)
    where = Model(path=str(base or adapter.base_model_name_or_path or ""), attention=attention)
    if not where.path:
        raise ArtefactError(f"{folder}: adapter_config.json names no base_model_name_or_path: give the base")
    check_settings(folder, where.path, SAME_BASE)
    own = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    tokenizer = ChatTokenizer(Model(path=str(folder)) if own else where)
    lm = load_causal_lm(where, dtype=dtype)
    _fit_vocabulary(folder, lm, tokenizer, where.path)
    layers = adapted(lm, adapter, folder)
    held = {key: name for key, name in names.items() if not _is_head(key)}
    check_factors(folder, where.path, layers, adapter, {key: shape_of[name] for key, name in held.items()})
    merge(layers, adapter, tensors(folder, held))
    return lm, tokenizer


def _fit_vocabulary(folder: Path, lm: CausalLM, tokenizer: ChatTokenizer, base: str) -> None:
    """Add a row for the padding token of the authors' code; ArtefactError for any other difference.

    Their code resizes the base to `len(tokenizer)`, which adds a row for a new `[PAD]` or removes unused rows. Pads are
    masked, so the values of that row do not matter.
    """
    trained, size = read_config(folder).vocab_size, lm.get_input_embeddings().weight.shape[0]
    beyond = tokens_from(tokenizer, size)
    if trained not in (size, len(tokenizer.hf)) or set(beyond.values()) - {tokenizer.pad_id}:
        raise ArtefactError(
            f"{base} is not the base of {folder}: its vocab_size is {size}, not {trained}, and the checkpoint's "
            f"tokenizer has {len(beyond)} tokens beyond it {sorted(beyond)[:3]}"
        )
    if beyond:
        lm.resize_token_embeddings(max(beyond.values()) + 1, mean_resizing=False)
