"""This project's reward models as adapters on a base that lies elsewhere, and ensembles on one base in memory.

A folder holds `adapter_model.safetensors` and `adapter_config.json` as PEFT writes them, `config.json` of the base
(with as many layers as were used), head, tokenizer and `reward_model.json`, whose `base` and `base_model` tell which
weights the adapter belongs to. So another member of an ensemble takes a few MB, on disk and in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from core.artefacts import ArtefactError
from core.config import NATIVE_DTYPE, Model
from core.models.layers import LowerLayers, load_causal_lm
from core.training import engine
from core.training.weights import save_adapter
from rm.checkpoints.folder import HUB_ID, locate, read_config, shapes, tensors
from rm.checkpoints.lora import (
    SAME_BASE,
    adapted,
    adapter_config,
    check_factors,
    check_settings,
    merge,
    weights_digest,
)
from rm.model import ABOUT_FILE, ADAPTER_FORMAT, RewardModel, read_about, read_head, read_tokenizer, save_head
from rm.objective import LowerCache
from rm.score import Tokens

PREFIX = "base_model.model."
"""PEFT's, before the names of the base."""
SETTINGS = (*(key for key in SAME_BASE if key != "num_hidden_layers"), "vocab_size", "rms_norm_eps", "rope_parameters")
"""What base and `config.json` must have in common; the number of layers may be less."""
CACHED_STATES = 1 << 30
"""Bytes of lower layers' states that members share in one call of `AdapterEnsemble.lower_cache`."""


def describe_base(base: Model) -> dict:
    """What tells the weights of `base` from others; ArtefactError where they are no safetensors of a causal LM."""
    folder = locate(base.path, base.revision)
    read_config(folder)
    return {"revision": base.revision, "digest": weights_digest(folder)}


def save_adapter_model(folder: Path, model: RewardModel, head: dict[str, Tensor], *, base: Model, **about) -> None:
    """Write what `RewardModel.from_pretrained` and PEFT read; every rank must call it, the first writes.

    Args:
        model: its LM as `core.models.layers.add_lora` made it from `base`.
    """
    lm = model.lm
    lm.peft_config["default"].revision = base.revision
    save_adapter(folder, lm)
    if engine.rank() == 0:
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
        if not _is_adapter(folder):
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
    return _cast(lm, dtype)


def one_base(paths: Sequence[str | Path]) -> bool:
    """Whether these are adapters of this project, two or more, that can share a base in memory."""
    folders = [locate(path) for path in paths]
    return len(folders) > 1 and all(map(_is_adapter, folders)) and len(set(map(_backbone, folders))) == 1


class AdapterMember(RewardModel):
    """One reward model of an `AdapterEnsemble`: all have one `lm`, and each call switches it to the member's adapter.

    Not for several threads at once.
    """

    def __init__(self, lm: nn.Module, name: str, *args, **options):
        super().__init__(lm, *args, **options)
        self.name = name

    def forward(self, *args, **options) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `RewardModel.forward`."""
        if self.lm.active_adapter != self.name:
            self.lm.set_adapter(self.name, inference_mode=True)
        return super().forward(*args, **options)


class AdapterEnsemble(nn.Module):
    """k reward models that are adapters and heads on one base, which is in memory once; for inference.

    Rewards are those of the unmerged adapters: those of `RewardModel.from_pretrained` up to rounding.

    Attributes:
        members: the reward models, [k]; each scores as any other.
    """

    def __init__(self, members: Sequence[AdapterMember]):
        super().__init__()
        self.lm = members[0].lm
        self.heads = nn.ModuleList(member.head for member in members)
        # In a tuple, which torch does not look into: an engine shall meet the base once, not k times.
        self.members = tuple(members)

    @classmethod
    def from_pretrained(
        cls,
        paths: Sequence[str | Path],
        *,
        dtype: str = NATIVE_DTYPE,
        attention: str = "sdpa",
        base: str | Path | None = None,
    ) -> AdapterEnsemble:
        """The models of these adapter folders, in their order; `base` in place of the one that they name.

        Raises:
            ArtefactError: anything that `RewardModel.from_pretrained` refuses; models of several bases.
        """
        from peft import PeftModel

        adapters = [Adapter.open(path, base) for path in paths]
        if other := [a.folder for a in adapters if _backbone(a.folder) != _backbone(adapters[0].folder)]:
            raise ArtefactError(f"{other[0]} has another base, type or number of layers than {adapters[0].folder}")
        lm = adapters[0].load_base(attention)
        for adapter in adapters:
            adapter.check(lm)
        lm, members = _cast(lm, dtype), []
        for i, adapter in enumerate(adapters):
            if i == 0:
                lm = PeftModel.from_pretrained(lm, adapter.folder, adapter_name="0", autocast_adapter_dtype=False)
            else:
                lm.load_adapter(adapter.folder, str(i), autocast_adapter_dtype=False)
            about, tokenizer = adapter.about, read_tokenizer(adapter.folder, adapter.about)
            member = AdapterMember(lm, str(i), about["head"], tokenizer, mean=about["mean"], std=about["std"])
            read_head(adapter.folder, member)
            members.append(member.eval())
        lm.to(engine.device())
        return cls(members).requires_grad_(False).eval().to(engine.device())

    def forward(self, *args, member: int, **options) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`RewardModel.forward` of a member."""
        return self.members[member](*args, **options)

    def through(self, forward: Callable) -> list[EngineMember]:
        """The members as `ppo.proxy.LocalProxy` takes them, where `forward` is an engine that holds this ensemble."""
        return [EngineMember(self, forward, i) for i in range(len(self.members))]

    def lower_cache(self, rows: Sequence[Tokens]) -> LowerCache | None:
        """For `rm.score`'s `lower`: the layers below all adapters, run once for all members; None where there are none,
        or where their states of these rows would take more than CACHED_STATES."""
        if self._lower is None:
            return None
        tokens = sum(len(prompt) + len(response) for prompt, response in set(rows))
        size = tokens * self.lm.config.hidden_size * next(self.parameters()).element_size()
        return LowerCache(self._lower) if size <= CACHED_STATES else None

    @cached_property  # which stores it where torch does not look: its parameters are those of `lm`
    def _lower(self) -> LowerLayers | None:
        """The layers below the lowest adapter of any member; None where there are none, or they cannot be cut off."""
        layers = self.lm.get_base_model().base_model.layers
        adapted = (any("lora_" in name for name, _ in layer.named_parameters()) for layer in layers)
        depth = next((i for i, found in enumerate(adapted) if found), len(layers))
        if not depth or not self.members[0].shares_prompts:
            return None
        lower = LowerLayers(self.lm, depth)
        try:
            lower.check(self.lm)
        except ArtefactError:
            return None
        return lower


class EngineMember:
    """A member of an ensemble that an engine holds, called as an engine of its own."""

    def __init__(self, ensemble: AdapterEnsemble, forward: Callable, number: int):
        self.module = ensemble.members[number]
        self._forward, self._number = forward, number

    def __call__(self, *args, **options) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._forward(*args, member=self._number, **options)


@torch.no_grad()
def _cast(lm: nn.Module, dtype: str) -> nn.Module:
    """The weights in another type; buffers, such as the rotary frequencies, stay in float32."""
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    lm.config.dtype = getattr(torch, dtype)
    return lm


def _is_adapter(folder: Path) -> bool:
    return (folder / ABOUT_FILE).is_file() and read_about(folder)["format"] == ADAPTER_FORMAT


def _backbone(folder: Path) -> tuple[str, str, int]:
    """What adapters have in common that can share a base in memory."""
    kept = read_about(folder)["base_model"]
    return kept["digest"], kept["dtype"], read_config(folder).num_hidden_layers
