"""This project's reward models as adapters on a base that lies elsewhere, and ensembles on one base in memory.

A folder holds `adapter_model.safetensors` and `adapter_config.json` as PEFT writes them, `config.json` of the base
(with as many layers as were used), head, tokenizer and `reward_model.json`, whose `base` and `base_model` tell which
weights the adapter belongs to. So another member of an ensemble takes a few MB, on disk and in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config import Model
from core.errors import ArtefactError
from core.models.loading import load_causal_lm
from core.training import distributed
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
"""PEFT's, before the names of the base."""

SETTINGS = (*(key for key in SAME_BASE if key != "num_hidden_layers"), "vocab_size", "rms_norm_eps", "rope_parameters")
"""What base and `config.json` must have in common; the number of layers may be less."""


def describe_base(base: Model) -> dict:
    """What tells the weights of `base` from others; ArtefactError where they are no safetensors of a causal LM."""
    folder = locate(base.path, base.revision)
    read_config(folder)
    return {"revision": base.revision, "digest": weights_digest(folder)}


def save_adapter_model(folder: Path, model: Saveable, head: dict[str, Tensor], *, base: Model, **about) -> None:
    """Write what `RewardModel.from_pretrained` and PEFT read; every rank must call it, the first writes.

    Args:
        model: its LM as `core.models.lora.add_lora` made it from `base`.
    """
    lm = model.lm
    lm.peft_config["default"].revision = base.revision
    save_adapter(folder, lm)
    if distributed.rank() == 0:
        lm.config.save_pretrained(folder)
        model.tokenizer.hf.save_pretrained(folder)
        of_base = describe_base(base) | {"dtype": str(next(lm.parameters()).dtype).removeprefix("torch.")}
        save_head(folder, model, head, format=ADAPTER_FORMAT, base=base.path, base_model=of_base, **about)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder and its base, which has been found to be the one it was trained on."""

    folder: Path
    about: dict
    base: Path

    @classmethod
    def open(cls, path: str | Path, base: str | Path | None = None) -> Adapter:
        """ArtefactError for another layout, or a base (by default the one that the folder names) of other weights."""
        folder = locate(path)
        if not is_adapter(folder):
            raise ArtefactError(f"{folder} is no adapter of this project")
        about = read_about(folder)
        where, kept = str(base or about["base"]), about["base_model"]
        if not Path(where).is_dir() and not HUB_ID.fullmatch(where):
            raise ArtefactError(f"{folder}: there is no folder of its base {where}: tell where it is (base, or --base)")
        found = locate(where, None if base else kept["revision"])
        check_settings(folder, found, SETTINGS)
        if (digest := weights_digest(found)) != kept["digest"]:
            raise ArtefactError(
                f"{found} is not the base of {folder}: the digest of its weights is {digest}, not {kept['digest']}"
            )
        return cls(folder, about, found)

    def load_base(self, attention: str) -> nn.Module:
        """The base in the type that it was trained in, with as many layers."""
        where, depth = Model(path=str(self.base), attention=attention), read_config(self.folder).num_hidden_layers
        return load_causal_lm(where, dtype=self.about["base_model"]["dtype"], num_layers=depth)

    def check(self, lm: nn.Module) -> tuple[object, dict[str, nn.Linear]]:
        """PEFT's configuration and the layers of `lm` that it adapts; ArtefactError for tensors that do not fit."""
        settings = adapter_config(self.folder)
        layers = adapted(lm, settings, self.folder)
        check_factors(self.folder, self.base, layers, settings, shapes(self.folder), PREFIX)
        return settings, layers


def merged(adapter: Adapter, *, dtype: str, attention: str) -> nn.Module:
    """The causal LM that the merged layout of the same model holds, to the bit."""
    lm = adapter.load_base(attention)
    settings, layers = adapter.check(lm)
    names = (f"{name}.lora_{side}.weight" for name in layers for side in "AB")
    merge(layers, settings, tensors(adapter.folder, {name: PREFIX + name for name in names}))
    return cast(lm, dtype)


@torch.no_grad()
def cast(lm: nn.Module, dtype: str) -> nn.Module:
    """The weights in another type; buffers, such as the rotary frequencies, stay in float32."""
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    lm.config.dtype = getattr(torch, dtype)
    return lm


def is_adapter(folder: Path) -> bool:
    return (folder / ABOUT_FILE).is_file() and read_about(folder)["format"] == ADAPTER_FORMAT


def backbone(folder: Path) -> tuple[str, str, int]:
    """What adapters have in common that can share a base in memory."""
    kept = read_about(folder)["base_model"]
    return kept["digest"], kept["dtype"], read_config(folder).num_hidden_layers
