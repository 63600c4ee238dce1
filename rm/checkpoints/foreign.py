"""Reading of reward models that other code wrote; a missing, extra or misshapen tensor is an error that names it.

The layout follows from the tensor names in the safetensors files (`adapter_model.safetensors`, `model.safetensors` or
its shards):

1. LoRA of the GRM authors' code (arXiv 2406.10216). Their trainer saves the trainable weights of the wrapped model
   and removes `pretrained_model.` from the names, so adapter and head are in one file:
   `model.layers.0.self_attn.q_proj.lora_A.default.weight`, `v_head.summary.0.weight`. Names with PEFT's own prefix
   (`base_model.model.`), with `pretrained_model.`, or without `.default` are read too. `adapter_config.json` has
   rank, alpha, targets and the base; `config.json` is that of the base with `vhead_*` added.
2. Full models: `model.*`, `v_head.summary.*`, and `lm_head.weight` in some (their published class has none).
3. Sequence classifiers with one label: `model.*`, `score.weight`; or another name of `foreign_heads.HEAD_NAMES`, with
   or without a bias.
4. Sequence classifiers that PEFT has trained: adapter and head as in 1 with the head's name of 3. Such a folder has no
   `config.json`, so that of the base counts.

`v_head.summary` is Linear(H, 1) with bias, or `vhead_num_layers` x [Linear(., neurons), ReLU] and Linear(neurons, 1).
Its dropout is off here. The reward is read at the last real token of the attention mask, never by pad id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from core.config import NATIVE_DTYPE, Attention, Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.architecture import hidden_size
from core.models.kernels import attention_kernel
from core.models.libraries import made_by_library
from core.models.loading import load_causal_lm
from core.models.logits import AbsentLmHead
from rm.checkpoints.folder import HUB_ID, check_vocabulary, locate, read_config, shapes, tensors, tokens_from
from rm.checkpoints.foreign_heads import ForeignHead, find_head, head_weights, is_head, plain
from rm.checkpoints.layout import Parts
from rm.checkpoints.lora import SAME_BASE, adapted, adapter_config, check_factors, check_settings, merge
from rm.reading import Reads


def read(
    path: str | Path, *, dtype: str = NATIVE_DTYPE, attention: Attention = "auto", base: str | Path | None = None
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
    names = {plain(key): key for key in shape_of if ".original_module." not in key}
    lora = any(".lora_" in key for key in names)
    config = _config(folder, base) if lora else read_config(folder)
    found = find_head(folder, {key: shape_of[name] for key, name in names.items()}, config)
    if lora:
        lm, tokenizer = _read_lora(folder, names, shape_of, base=base, dtype=dtype, attention=attention)
    elif base is not None:
        raise ArtefactError(f"{folder} is not a LoRA checkpoint, so it cannot be put on the base {base}")
    else:
        tokenizer = ChatTokenizer(Model(path=str(folder)))
        check_vocabulary(folder, tokenizer)
        lm = _read_lm(folder, names, found, dtype, attention)
    head = head_weights(folder, found, names, hidden_size(lm))
    # Written by `rm.tools.export`; for other models the scale is not known.
    mean, std = getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
    return Parts(lm, found.kind, head, tokenizer, mean, std, _reads(config, found))


def _reads(config, head: ForeignHead) -> Reads:
    """What an export says of itself, else what the makers of models in this layout do (`rm.reading`)."""
    if said := getattr(config, "reward_reads", None):
        return said
    if hasattr(config, "reward_mean"):  # an export by version 0.1
        return "end_of_turn"
    return "whole_as_text" if head.is_authors else "whole"


def _config(folder: Path, base: str | Path | None):
    """The configuration of a LoRA checkpoint: its own, or that of its base where PEFT alone has written the folder."""
    if (folder / "config.json").is_file():
        return read_config(folder)
    return read_config(locate(*_base(folder, base)))


def _base(folder: Path, base: str | Path | None) -> tuple[str, str | None]:
    """Folder or hub id of the base of a LoRA checkpoint, and its revision."""
    adapter = adapter_config(folder)
    where = str(base or adapter.base_model_name_or_path or "")
    if not where:
        raise ArtefactError(f"{folder}: adapter_config.json names no base_model_name_or_path: give the base")
    if not Path(where).is_dir() and not HUB_ID.fullmatch(where):
        raise ArtefactError(f"{folder}: its base {where} does not exist: give its folder (base, or --base)")
    return where, None if base else adapter.revision


def _read_lm(folder: Path, names: Mapping[str, str], head: ForeignHead, dtype: str, attention: Attention) -> CausalLM:
    """The trunk with its LM head: the one in the files, the tied one, or an `AbsentLmHead`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of "unexpected" heads; what does not fit is reported below
    try:
        with made_by_library(f"no model can be made of {folder}"):
            lm, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), trust_remote_code=False,
                attn_implementation=attention_kernel(read_config(folder), attention, str(folder)),
                use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    lm_head = next(f"{name}.weight" for name, m in lm.named_modules() if m is lm.get_output_embeddings())
    wrong = [f"{key} is missing" for key in sorted(set(info["missing_keys"]) - {lm_head})]
    wrong += [f"{key} is extra" for key in sorted(info["unexpected_keys"]) if not is_head(plain(key))]
    wrong += [f"{k} is {list(has)}, not {list(needs)}" for k, has, needs in sorted(info["mismatched_keys"])]
    if wrong:
        raise ArtefactError(f"{folder} does not fit its config.json: {', '.join(wrong[:6])}")
    # The embeddings of a classifier were never an LM head, even if its configuration still ties the two.
    tied = lm.config.tie_word_embeddings and head.is_authors
    if lm_head not in names and not tied:
        lm.set_output_embeddings(AbsentLmHead("was saved without an LM head"))
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
    path, revision = _base(folder, base)
    where = Model(path=path, revision=revision, attention=attention)
    if (folder / "config.json").is_file():
        check_settings(folder, locate(path, revision), SAME_BASE)
    own = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    tokenizer = ChatTokenizer(Model(path=str(folder)) if own else where)
    lm = load_causal_lm(where, dtype=dtype)
    _fit_vocabulary(folder, lm, tokenizer, where.path)
    layers = adapted(lm, adapter, folder)
    held = {key: name for key, name in names.items() if not is_head(key)}
    check_factors(folder, where.path, layers, adapter, {key: shape_of[name] for key, name in held.items()})
    merge(layers, adapter, tensors(folder, held))
    return lm, tokenizer


def _fit_vocabulary(folder: Path, lm: CausalLM, tokenizer: ChatTokenizer, base: str) -> None:
    """Add a row for the padding token of the authors' code; ArtefactError for any other difference.

    Their code resizes the base to `len(tokenizer)`, which adds a row for a new `[PAD]` or removes unused rows. Pads are
    masked, so the values of that row do not matter.
    """
    size = lm.get_input_embeddings().weight.shape[0]
    trained = read_config(folder).vocab_size if (folder / "config.json").is_file() else size
    beyond = tokens_from(tokenizer, size)
    if trained not in (size, len(tokenizer.hf)) or set(beyond.values()) - {tokenizer.pad_id}:
        raise ArtefactError(
            f"{base} is not the base of {folder}: its vocab_size is {size}, not {trained}, and the checkpoint's "
            f"tokenizer has {len(beyond)} tokens beyond it {sorted(beyond)[:3]}"
        )
    if beyond:
        lm.resize_token_embeddings(max(beyond.values()) + 1, mean_resizing=False)
