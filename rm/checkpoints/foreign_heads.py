"""Reward heads in the files of other code: what they are called, of which kind they are, and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from core.errors import ArtefactError
from rm.checkpoints.folder import faults, tensors
from rm.heads import make_head

V_HEAD = "v_head.summary."
"""Prefix of the head in the GRM authors' files, and in TRL's models with a value head."""
HEAD_NAMES = ("score", "v_head", "value_head", "reward_head", "regression_head", "rm_head", "classifier")
"""Modules that are a reward head: transformers' classifiers; TRL and the GRM authors; OpenRLHF; others."""


@dataclass(frozen=True, slots=True)
class ForeignHead:
    """The one head of a folder."""

    prefix: str
    """Of the names of its tensors, for example `score.`."""
    kind: str
    """As `rm.heads.make_head` names it."""

    @property
    def is_authors(self) -> bool:
        """In the layout of the GRM authors' code."""
        return self.prefix == V_HEAD


def plain(key: str) -> str:
    """The name in the causal LM or the head, without the prefixes of wrappers."""
    while (shorter := key.removeprefix("base_model.model.").removeprefix("pretrained_model.")) != key:
        key = shorter
    key = re.sub(r"\.modules_to_save(\.default)?\.", ".", key)
    return re.sub(r"(\.lora_[AB])\.default\.", r"\1.", key)


def is_head(key: str) -> bool:
    """Whether a plain name is that of a tensor of a reward head."""
    return key.partition(".")[0] in HEAD_NAMES


def find_head(folder: Path, shape_of: Mapping[str, tuple[int, ...]], config) -> ForeignHead:
    """The reward head among the tensors of a folder.

    Args:
        shape_of: plain name -> shape.
        config: of transformers; its `vhead_*` say what the GRM authors' head is, where it has them.

    Raises:
        ArtefactError: no head, two of them, or one of a kind that its tensors do not tell.
    """
    names = [name for name in HEAD_NAMES if any(key.startswith(name + ".") for key in shape_of)]
    if not names:
        top = ", ".join(sorted({key.split(".")[0] for key in shape_of}))
        more = "it is an adapter alone: " if any(".lora_" in key for key in shape_of) else ""
        raise ArtefactError(
            f"{folder}: no reward head among its tensors ({more}it holds {top}); a head is called "
            f"{', '.join(HEAD_NAMES)}: rename it in the file, or give a model that has one"
        )
    if len(names) > 1:
        raise ArtefactError(f"{folder} holds the heads {' and '.join(names)}: remove the one that gives no reward")
    name = names[0]
    own = {key.removeprefix(f"{name}."): shape for key, shape in shape_of.items() if key.startswith(f"{name}.")}
    if any(key.startswith("summary.") for key in own):
        of_summary = {key.removeprefix("summary."): s for key, s in own.items() if key.startswith("summary.")}
        told = any(key.startswith("vhead_") for key in vars(config))
        kind = _told_kind(folder, config) if told else _kind_of(folder, f"{name}.summary.", of_summary)
        return ForeignHead(f"{name}.summary.", kind)
    if not set(own) <= {"weight", "bias"}:
        layers = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(own.items()))
        raise ArtefactError(
            f"{folder}: {name} is not a linear layer but {layers}; "
            "its activations are not in the file, so it cannot be read"
        )
    return ForeignHead(f"{name}.", "linear_bias" if "bias" in own else "linear")


def head_weights(folder: Path, head: ForeignHead, names: Mapping[str, str], hidden_size: int) -> dict[str, Tensor]:
    """The tensors of the head in float32, under the names of `make_head`; ArtefactError if they do not fit.

    Args:
        names: plain name -> name in the files, of all tensors.
    """
    weights = tensors(folder, {key: name for key, name in names.items() if is_head(key)})
    wanted = {head.prefix + k: tuple(t.shape) for k, t in make_head(head.kind, hidden_size).state_dict().items()}
    if wrong := faults(wanted, {key: tuple(tensor.shape) for key, tensor in weights.items()}):
        # The authors' training script always builds 1024 neurons, but writes the value of `--num_neurons`.
        hint = "; `vhead_*` in config.json must be that of the trained head" if head.is_authors else ""
        raise ArtefactError(f"{folder} does not fit a {head.kind} head: {wrong}{hint}")
    return {key.removeprefix(head.prefix): tensor.float() for key, tensor in weights.items()}


def _told_kind(folder: Path, config) -> str:
    """The kind by `vhead_*`; missing settings have the defaults of the authors' code."""
    if getattr(config, "vhead_num_output", 1) != 1:
        raise ArtefactError(f"{folder}: vhead_num_output is {config.vhead_num_output}, but a reward is one number")
    if getattr(config, "vhead_layer_type", "mlp") == "linear":
        return "linear_bias"
    neurons, layers = getattr(config, "vhead_num_neurons", 1024), getattr(config, "vhead_num_layers", 1)
    return _mlp(neurons, layers)


def _kind_of(folder: Path, prefix: str, own: Mapping[str, tuple[int, ...]]) -> str:
    """The kind by the tensors: one linear layer, or the authors' layers at the places 0, 2, 4 and so on."""
    if set(own) <= {"weight", "bias"}:
        return "linear_bias" if "bias" in own else "linear"
    places = sorted({int(key.split(".")[0]) for key in own if re.fullmatch(r"\d+\.(weight|bias)", key)})
    if not places or places != list(range(0, 2 * len(places), 2)) or "0.weight" not in own:
        raise ArtefactError(f"{folder}: {prefix}* are not the layers of a known head: {', '.join(sorted(own))}")
    return _mlp(own["0.weight"][0], len(places) - 1)


def _mlp(neurons: int, layers: int) -> str:
    return "mlp" if (neurons, layers) == (1024, 1) else f"mlp:{neurons}x{layers}"
