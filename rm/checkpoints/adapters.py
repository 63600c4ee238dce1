"""This project's reward models as adapters on a base that is stored elsewhere.

A folder has `adapter_model.safetensors` and `adapter_config.json` as PEFT writes them, `config.json` of the base (with
the number of layers that were used), head, tokenizer and `reward_model.json`, whose `base` and `base_model` identify
the weights that the adapter belongs to. So a further member of an ensemble takes a few MB, on disk and in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config import Attention, Model
from core.data.tokenizer_files import save_tokenizer
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.architecture import text_config
from core.models.loading import load_causal_lm, save_config
from core.training import distributed, sharding
from core.training.sharding import Shards
from core.training.weights import save_adapter
from rm.checkpoints.folder import HUB_ID, locate, read_config, shapes, tensors
from rm.checkpoints.layout import ABOUT_FILE, ADAPTER_FORMAT, Saveable, read_about, save_head
from rm.checkpoints.lora import (
    SAME_BASE,
    adapted,
    adapter_config,
    check_factors,
    check_settings,
    merge,
    weights_digest,
)

PREFIX = "base_model.model."
"""PEFT puts it before the names of the base."""

SETTINGS = (*(key for key in SAME_BASE if key != "num_hidden_layers"), "vocab_size", "rms_norm_eps", "rope_parameters")
"""What the base and `config.json` must have in common; the latter may have fewer layers."""


def describe_base(base: Model) -> dict:
    """What identifies the weights of `base`; ArtefactError if they are not safetensors of a causal LM."""
    folder = locate(base.path, base.revision)
    read_config(folder)
    return {"revision": base.revision, "digest": weights_digest(folder)}


def save_adapter_model(folder: Path, model: Saveable, head: dict[str, Tensor], *, base: Model, **about) -> None:
    """Write what `RewardModel.from_pretrained` and PEFT read. Every rank must call it; the first one writes.

    Args:
        model: its LM is what `core.models.lora.add_lora` makes of `base`.
    """
    lm = model.lm
    lm.peft_config["default"].revision = base.revision
    save_adapter(folder, lm)
    if distributed.rank() == 0:
        save_config(folder, lm.config)
        save_tokenizer(folder, model.tokenizer)
        of_base = describe_base(base) | {"dtype": str(next(lm.parameters()).dtype).removeprefix("torch.")}
        save_head(folder, model, head, format=ADAPTER_FORMAT, base=base.path, base_model=of_base, **about)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder and its base, checked to be the one that the adapter was trained on."""

    folder: Path
    about: dict
    base: Path

    @classmethod
    def open(cls, path: str | Path, base: str | Path | None = None) -> Adapter:
        """Open a folder; `base` replaces the base that the folder names.

        Raises:
            ArtefactError: a folder in another layout, no such base, or a base with other weights.
        """
        folder = locate(path)
        if not is_adapter(folder):
            raise ArtefactError(f"{folder} is not an adapter of this project")
        about = read_about(folder)
        where, kept = str(base or about["base"]), about["base_model"]
        if not Path(where).is_dir() and not HUB_ID.fullmatch(where):
            raise ArtefactError(f"{folder}: its base {where} does not exist: give its folder (base, or --base)")
        located = locate(where, None if base else kept["revision"])
        check_settings(folder, located, SETTINGS)
        if (digest := weights_digest(located)) != kept["digest"]:
            raise ArtefactError(
                f"{located} is not the base of {folder}: the digest of its weights is {digest}, not {kept['digest']}"
            )
        return cls(folder, about, located)

    def load_base(self, attention: Attention, shards: Shards | None = None) -> CausalLM:
        """The base in the type that it had in training, with as many layers; `shards` as in `load_causal_lm`."""
        where, depth = (
            Model(path=str(self.base), attention=attention),
            text_config(read_config(self.folder)).num_hidden_layers,
        )
        return load_causal_lm(where, dtype=self.about["base_model"]["dtype"], num_layers=depth, shards=shards)

    def check(self, lm: CausalLM) -> tuple[object, dict[str, nn.Module]]:
        """PEFT's configuration and the layers of `lm` that it adapts; ArtefactError if the tensors do not fit."""
        settings = adapter_config(self.folder)
        layers = adapted(lm, settings, self.folder)
        check_factors(self.folder, self.base, layers, settings, shapes(self.folder), PREFIX)
        return settings, layers


def merged(adapter: Adapter, *, dtype: str, attention: Attention, shards: Shards | None = None) -> CausalLM:
    """The causal LM with the adapter merged into it; bit for bit the one in the merged layout of the same model."""
    lm = adapter.load_base(attention, shards)
    settings, layers = adapter.check(lm)
    names = (f"{name}.lora_{side}.weight" for name in layers for side in "AB")
    merge(layers, settings, tensors(adapter.folder, {name: PREFIX + name for name in names}))
    return cast(lm, dtype)


@torch.no_grad()
def cast(lm: CausalLM, dtype: str) -> CausalLM:
    """The LM with its weights in another type; buffers such as the rotary frequencies stay in float32."""
    for parameter in lm.parameters():
        sharding.cast(parameter, getattr(torch, dtype))
    lm.config.dtype = getattr(torch, dtype)
    return lm


def is_adapter(folder: Path) -> bool:
    return (folder / ABOUT_FILE).is_file() and read_about(folder)["format"] == ADAPTER_FORMAT


def backbone(folder: Path) -> tuple[str, str, int]:
    """What adapters must have in common to share a base in memory: its digest, type and number of layers."""
    kept = read_about(folder)["base_model"]
    return kept["digest"], kept["dtype"], text_config(read_config(folder)).num_hidden_layers
