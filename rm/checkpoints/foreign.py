"""Reading reward models that other code wrote; every missing, extra or mis-shaped tensor is refused by name.

Layouts, told apart by the names in the safetensors files (`adapter_model.safetensors`, `model.safetensors` or its
shards):

1. LoRA of the GRM authors' code (arXiv 2406.10216). Their trainer keeps the trainable weights of the wrapped model
   with `pretrained_model.` taken out of the names, so that adapter and head lie side by side:
   `model.layers.0.self_attn.q_proj.lora_A.default.weight`, `v_head.summary.0.weight`. PEFT's own prefix
   (`base_model.model.`), a `pretrained_model.` left in, and names without `.default` are understood too.
   `adapter_config.json` holds rank, alpha, targets and the base; `config.json` is the base's with `vhead_*`.
2. Full: `model.*`, `v_head.summary.*` and perhaps `lm_head.weight` (their published class has none).
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

from core.config import NATIVE_DTYPE, Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.models.loading import load_causal_lm
from rm.checkpoints.folder import check_vocabulary, faults, locate, read_config, shapes, tensors, tokens_from
from rm.checkpoints.layout import Parts
from rm.checkpoints.lora import SAME_BASE, adapted, adapter_config, check_factors, check_settings, merge
from rm.heads import make_head

V_HEAD = "v_head.summary."
SCORE = "score."


class AbsentLmHead(nn.Module):
    """Stands where a checkpoint has no LM head; log-probs asked of it are an ArtefactError."""

    out_features = 1  # of no vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        raise ArtefactError("this reward model was saved without an LM head: it has rewards, but no log-probs")


def has_lm_head(lm: nn.Module) -> bool:
    return not isinstance(lm.get_output_embeddings(), AbsentLmHead)


def read(
    path: str | Path, *, dtype: str = NATIVE_DTYPE, attention: str = "sdpa", base: str | Path | None = None
) -> Parts:
    """The parts of a reward model in one of the module's layouts, its trunk in `dtype`, its head in float32.

    Args:
        path: a folder or a hub id.
        base: for LoRA, a folder or hub id in place of the one that `adapter_config.json` names.

    Raises:
        ArtefactError: no such layout; tensors that do not fit; another base; another vocabulary; pickles only.
        DataError: a tokenizer that `ChatTokenizer` refuses.
    """
    folder = locate(path)
    found = shapes(folder)
    config = read_config(folder)
    names = {_plain(key): key for key in found}
    prefix = V_HEAD if any(key.startswith("v_head.") for key in names) else SCORE
    lora = any(".lora_" in key for key in names)
    if not any(key.startswith(prefix) for key in names):
        top = ", ".join(sorted({key.split(".")[0] for key in names}))
        more = "it is an adapter alone" if lora else "encoder classifiers are not supported"
        raise ArtefactError(f"{folder}: {V_HEAD}* and {SCORE}weight are missing ({more}; it holds {top})")
    if lora:
        lm, tokenizer = _read_lora(folder, names, found, base=base, dtype=dtype, attention=attention)
    elif base is not None:
        raise ArtefactError(f"{folder} is not a LoRA checkpoint, so it cannot be put on the base {base}")
    else:
        tokenizer = ChatTokenizer(Model(path=str(folder)))
        check_vocabulary(folder, tokenizer)
        lm = _read_lm(folder, found, dtype, attention)
    kind = _authors_head(folder, config) if prefix == V_HEAD else "linear"
    # Set by `rm.tools.export`; other people's models have no known scale.
    mean, std = getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
    heads = {key: name for key, name in names.items() if _is_head(key)}
    wanted = make_head(kind, lm.config.hidden_size).state_dict()
    head = _head_weights(wanted, tensors(folder, heads), prefix, f"{folder} does not fit a {kind} head")
    return Parts(lm, kind, head, tokenizer, mean, std)


def _plain(key: str) -> str:
    """The name in the causal LM (or of the head), whatever was wrapped around it when it was saved."""
    while (shorter := key.removeprefix("base_model.model.").removeprefix("pretrained_model.")) != key:
        key = shorter
    return re.sub(r"(\.lora_[AB])\.default\.", r"\1.", key)


def _is_head(key: str) -> bool:
    return key.startswith(("v_head.", SCORE))


def _authors_head(folder: Path, config) -> str:
    """The kind that `make_head` knows; absent settings have the defaults of the authors' code."""
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
        # The authors' training script builds 1024 neurons whatever `--num_neurons` says, and writes what it says.
        hint = "; `vhead_*` in config.json must say what was trained" if prefix == V_HEAD else ""
        raise ArtefactError(f"{what}: {wrong}{hint}")
    return {key.removeprefix(prefix): tensor.float() for key, tensor in weights.items()}


def _read_lm(folder: Path, found: Mapping[str, tuple], dtype: str, attention: str) -> nn.Module:
    """The trunk, with the LM head that is in the files, or tied, or with none."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of "unexpected" heads would alarm; what does not fit is told below
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
    # A classifier's embeddings were never an LM head, even where its configuration still ties the two.
    tied = lm.config.tie_word_embeddings and f"{SCORE}weight" not in found
    if lm_head not in found and not tied:
        lm.set_output_embeddings(AbsentLmHead())
        lm.config.tie_word_embeddings = False
    return lm


def _read_lora(
    folder: Path,
    names: Mapping[str, str],
    found: Mapping[str, tuple],
    *,
    base: str | Path | None,
    dtype: str,
    attention: str,
) -> tuple[nn.Module, ChatTokenizer]:
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
    check_factors(folder, where.path, layers, adapter, {key: found[name] for key, name in held.items()})
    merge(layers, adapter, tensors(folder, held))
    return lm, tokenizer


def _fit_vocabulary(folder: Path, lm: nn.Module, tokenizer: ChatTokenizer, base: str) -> None:
    """Room for the padding token that the authors' code adds; ArtefactError for any other difference.

    Their code resizes the base to `len(tokenizer)`: a row more for a new `[PAD]`, or unused rows less. Pads are
    masked, so what their row holds is of no account.
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
