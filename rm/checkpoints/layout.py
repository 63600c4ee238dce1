"""Files of this project's reward models next to the weights: what they contain, reading and writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from torch import Tensor

from core.config import Attention, Dtype, Model
from core.data.chat import ChatTokenizer
from core.data.templates import OWN_CLOCK
from core.errors import ArtefactError
from core.files import read_json, read_tensors, write_json
from core.models import CausalLM
from core.models.kernels import soft_cap
from core.models.libraries import made_by_library
from core.models.loading import save_lm
from core.models.weight_files import SHARD_BYTES
from rm.checkpoints.folder import check_vocabulary, read_config
from rm.heads import make_head
from rm.reading import Reads

HEAD_FILE = "head.safetensors"
ABOUT_FILE = "reward_model.json"
MERGED_FORMAT, ADAPTER_FORMAT = 1, 2
"""Formats of ABOUT_FILE: next to a whole language model, or next to an adapter (`rm.checkpoints.adapters`)."""

ABOUT: Mapping[str, Callable[[Any], bool]] = {
    "head": lambda kind: isinstance(kind, str),
    "tokenizer": lambda fingerprint: isinstance(fingerprint, str),
    "mean": lambda mean: isinstance(mean, float | int) and math.isfinite(mean),
    "std": lambda std: isinstance(std, float | int) and math.isfinite(std) and std > 0,
    "reads": lambda reads: reads in get_args(Reads),
    "attention": lambda kernel: kernel is None or isinstance(kernel, str),
}
"""What ABOUT_FILE says of every reward model, and whether a value can be right."""
ABOUT_BASE: Mapping[str, Callable[[Any], bool]] = {
    "base": lambda path: isinstance(path, str),
    "base_model": lambda kept: (
        isinstance(kept, dict)
        and {"revision", "digest", "dtype"} <= kept.keys()
        and kept["dtype"] in get_args(Dtype)
        and isinstance(kept["revision"], str | None)
    ),
}
"""What it says of the base, where the folder has an adapter."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The checked contents of a checkpoint, which `rm.model.RewardModel` is made of."""

    lm: CausalLM
    head_kind: str
    head: Mapping[str, Tensor]
    tokenizer: ChatTokenizer
    mean: float
    std: float
    reads: Reads = "end_of_turn"


class Saveable(Protocol):
    """What the functions below need of a reward model."""

    lm: CausalLM
    head_kind: str
    tokenizer: ChatTokenizer
    mean: float
    std: float
    reads: Reads


def read_about(folder: Path) -> dict:
    """`reward_model.json`; ArtefactError for an unknown format, and for values that cannot be right."""
    file = folder / ABOUT_FILE
    about = read_json(file)
    found = about.get("format") if isinstance(about, dict) else None
    if not isinstance(found, int) or found not in (MERGED_FORMAT, ADAPTER_FORMAT):
        raise ArtefactError(f"{file}: format {found!r} is not known to this version")
    about = {"reads": "end_of_turn", "attention": None, **about}  # version 0.1 wrote neither
    checks = {**ABOUT, **(ABOUT_BASE if found == ADAPTER_FORMAT else {})}
    wrong = [f"{key} is {about.get(key)!r}" for key, is_right in checks.items() if not is_right(about.get(key))]
    if wrong:
        raise ArtefactError(f"{file} is not what `grm rm` writes: {', '.join(wrong)}"[:500])
    return about


def kept_kernel(folder: Path, about: Mapping) -> Attention:
    """The attention kernel that the model was trained with. A flash kernel, which other machines may not have, and a
    folder that does not say it, give auto.

    Raises:
        ArtefactError: a folder of version 0.1 whose architecture caps attention scores: it was trained without the cap.
    """
    kept = about["attention"]
    if kept is None and (cap := soft_cap(read_config(folder))) is not None:
        raise ArtefactError(
            f"{folder} was written by version 0.1, which trained with the kernel sdpa and so without the cap of "
            f"{cap:g} on attention scores that its architecture has (attn_logit_softcapping): with the cap its rewards "
            "are others, so train it again"
        )
    return kept if kept in ("eager", "sdpa") else "auto"


def read_tokenizer(folder: Path, about: Mapping) -> ChatTokenizer:
    """The tokenizer in the folder.

    Raises:
        ArtefactError: it is not the one in `reward_model.json`, or has tokens beyond the vocabulary of the model.
    """
    tokenizer = ChatTokenizer(Model(path=str(folder)))
    if tokenizer.fingerprint != about["tokenizer"]:
        fault = f"{folder}: tokenizer or chat template is not the one the model was trained with"
        if about["attention"] is None and OWN_CLOCK in tokenizer.hf.chat_template:
            fault += (
                ". Its template writes today's date, which version 0.1 took from the clock and this version fixes "
                "(chat_date): train it again"
            )
        raise ArtefactError(fault)
    check_vocabulary(folder, tokenizer)
    return tokenizer


def read_head(folder: Path, kind: str, hidden_size: int) -> dict[str, Tensor]:
    """Weights of the head in the folder; ArtefactError with their names if they do not fit a head of this kind."""
    weights = read_tensors(folder / HEAD_FILE)
    with made_by_library(f"{folder / ABOUT_FILE} names no head that this version knows"):
        wanted = make_head(kind, hidden_size).state_dict()
    shapes = ({k: v.shape for k, v in state.items()} for state in (wanted, weights))
    if wrong := sorted({name for name, _ in set.symmetric_difference(*(set(s.items()) for s in shapes))}):
        raise ArtefactError(f"{folder / HEAD_FILE} does not fit a {kind} head: {', '.join(wrong)}")
    return weights


def save_reward_model(
    folder: Path, model: Saveable, named_weights: Iterable[tuple[str, Tensor]], head: dict, *,
    shard_bytes: int = SHARD_BYTES, **about,
) -> None:  # fmt: skip
    """Write what `RewardModel.from_pretrained` reads: the LM as transformers saves it, tokenizer, head and facts."""
    save_lm(folder, model.lm.config, named_weights, model.tokenizer, shard_bytes=shard_bytes)
    save_head(folder, model, head, **about)


def save_head(folder: Path, model: Saveable, head: dict, **about) -> None:
    """Write the files next to the weights of the LM: the head, and `about` in ABOUT_FILE."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in head.items()}, folder / HEAD_FILE)
    facts = {"head": model.head_kind, "tokenizer": model.tokenizer.fingerprint, "mean": model.mean, "std": model.std}
    facts |= {"reads": model.reads, "attention": model.lm.config._attn_implementation}
    write_json(folder / ABOUT_FILE, {"format": MERGED_FORMAT, **facts, **about})
