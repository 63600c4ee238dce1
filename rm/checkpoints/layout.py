"""Files of this project's reward models: what lies beside the weights, and how it is read and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from core.config import Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.files import read_json, write_json
from core.models.loading import save_lm
from rm.checkpoints.folder import check_vocabulary
from rm.heads import make_head

HEAD_FILE = "head.safetensors"
ABOUT_FILE = "reward_model.json"
MERGED_FORMAT, ADAPTER_FORMAT = 1, 2
"""Of ABOUT_FILE: beside a whole language model, or beside an adapter (`rm.checkpoints.adapters`)."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a checkpoint holds, checked; `rm.model.RewardModel` is made of it."""

    lm: nn.Module
    head_kind: str
    head: Mapping[str, Tensor]
    tokenizer: ChatTokenizer
    mean: float
    std: float


class Saveable(Protocol):
    """What the functions below read of a reward model."""

    lm: nn.Module
    head_kind: str
    tokenizer: ChatTokenizer
    mean: float
    std: float


def read_about(folder: Path) -> dict:
    """`reward_model.json`; ArtefactError for a format that is not known."""
    about = read_json(folder / ABOUT_FILE)
    if about["format"] not in (MERGED_FORMAT, ADAPTER_FORMAT):
        raise ArtefactError(f"{folder / ABOUT_FILE}: this version does not know its format {about['format']}")
    return about


def read_tokenizer(folder: Path, about: Mapping) -> ChatTokenizer:
    """The tokenizer in the folder; ArtefactError when it is not the one that its `reward_model.json` tells of, or has
    tokens beyond the model's vocabulary."""
    tokenizer = ChatTokenizer(Model(path=str(folder)))
    if tokenizer.fingerprint != about["tokenizer"]:
        raise ArtefactError(f"{folder}: tokenizer or chat template is not the one the model was trained with")
    check_vocabulary(folder, tokenizer)
    return tokenizer


def read_head(folder: Path, kind: str, hidden_size: int) -> dict[str, Tensor]:
    """Weights of the head in the folder; ArtefactError, naming them, where they do not fit a head of this kind."""
    from safetensors.torch import load_file

    weights = load_file(folder / HEAD_FILE)
    shapes = ({k: v.shape for k, v in state.items()} for state in (make_head(kind, hidden_size).state_dict(), weights))
    if wrong := sorted({name for name, _ in set.symmetric_difference(*(set(s.items()) for s in shapes))}):
        raise ArtefactError(f"{folder / HEAD_FILE} does not fit a {kind} head: {', '.join(wrong)}")
    return weights


def save_reward_model(
    folder: Path, model: Saveable, named_weights: Iterable[tuple[str, Tensor]], head: dict, **about
) -> None:
    """Write what `RewardModel.from_pretrained` reads: the LM as transformers saves it, head, tokenizer, facts."""
    save_lm(folder, model.lm.config, named_weights, model.tokenizer)
    save_head(folder, model, head, **about)


def save_head(folder: Path, model: Saveable, head: dict, **about) -> None:
    """What lies beside the LM's weights: the head, and facts."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in head.items()}, folder / HEAD_FILE)
    facts = {"head": model.head_kind, "tokenizer": model.tokenizer.fingerprint, "mean": model.mean, "std": model.std}
    write_json(folder / ABOUT_FILE, {"format": MERGED_FORMAT, **facts, **about})
