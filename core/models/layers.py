"""Hidden states of causal language models; frozen layers that several models share, and a cache of their states."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.batching import Batch
from core.errors import ArtefactError
from core.models import CausalLM


def train_top_layers(lm: CausalLM, count: int | None) -> None:
    """Freeze all but the top `count` layers and the final norm; None trains everything, 0 nothing.

    Raises:
        ArtefactError: `lm` has fewer layers.
    """
    if count is None:
        return
    layers = lm.base_model.layers
    if count > len(layers):
        raise ArtefactError(f"trainable_layers {count} exceeds the model's {len(layers)} layers")
    lm.requires_grad_(False)
    for module in (*layers[len(layers) - count :], lm.base_model.norm) if count else ():
        module.requires_grad_(True)


class FrozenStates(NamedTuple):
    """What the lowest `depth` layers, frozen and shared, computed: a model continues from there."""

    depth: int
    states: Tensor  # [B, L, H]


def hidden_states(
    lm: CausalLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    positions: Tensor | None = None,
    frozen: FrozenStates | None = None,
) -> Tensor:
    """Hidden states [B, L, H] after the final norm; `lm` may have adapters.

    Args:
        input_ids: [B, L].
        attention_mask: [B, L], or bool [B, 1, L, L] of `core.batching.pack` (eager and sdpa attention only).
        positions: [B, L]; by default they follow the mask, so that left and right padding agree.
        frozen: states of the lowest layers, by `FrozenLayers`; those layers are then not run.

    Raises:
        ValueError: a mask [B, 1, L, L] with flash attention.
    """
    trunk = _trunk(lm)
    if frozen is None:
        return _states(trunk, {"input_ids": input_ids}, attention_mask, positions)
    with _layers_from(trunk, frozen.depth):
        return _states(trunk, {"inputs_embeds": frozen.states}, attention_mask, positions)


def _states(trunk: CausalLM, inputs: dict[str, Tensor], attention_mask: Tensor, positions: Tensor | None) -> Tensor:
    if positions is None:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    if attention_mask.dim() == 4:
        if trunk.config._attn_implementation.startswith("flash"):
            raise ValueError("flash attention takes no mask of shared prompts: use sdpa, or give rows of one response")
        dtype = next(trunk.parameters()).dtype
        additive = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
        attention_mask = additive.masked_fill(~attention_mask, torch.finfo(dtype).min)
    return trunk(**inputs, attention_mask=attention_mask, position_ids=positions, use_cache=False).last_hidden_state


class FrozenLayers(nn.Module):
    """The embedding and the lowest `depth` layers of `lm`, frozen.

    Models that differ only above them can share what they compute. The parameters are those of `lm`, not copies.
    """

    def __init__(self, lm: CausalLM, depth: int):
        super().__init__()
        self.depth = depth
        trunk = copy.copy(_trunk(lm))
        trunk._modules = dict(trunk._modules)  # a shallow copy shares the table of submodules
        trunk.layers, trunk.norm = nn.ModuleList(trunk.layers[:depth]), nn.Identity()
        self.trunk = trunk.requires_grad_(False)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> FrozenStates:
        """The states after the last of these layers; inputs as in `hidden_states`."""
        return FrozenStates(self.depth, _states(self.trunk, {"input_ids": input_ids}, attention_mask, positions))

    @torch.no_grad()
    def check(self, lm: CausalLM) -> None:
        """Check on one row that `lm`, continued from these layers, computes what it computes whole.

        Raises:
            ArtefactError: it does not.
        """
        ids = torch.arange(3, 19, device=next(lm.parameters()).device)[None]
        mask = torch.ones_like(ids)
        whole, split = hidden_states(lm, ids, mask), hidden_states(lm, ids, mask, frozen=self(ids, mask))
        if not torch.allclose(whole, split, rtol=0.02, atol=0.02 * float(whole.abs().mean())):
            raise ArtefactError(
                f"the first {self.depth} layers of {lm.config.name_or_path} are not those of the base model, or its "
                "architecture cannot be cut there: set rm.cache_frozen_layers and ppo.reuse_frozen_layers to false"
            )


def _trunk(lm: CausalLM) -> CausalLM:
    return lm.get_base_model().base_model if hasattr(lm, "peft_config") else lm.base_model


@contextmanager
def _layers_from(trunk: CausalLM, start: int) -> Iterator[None]:
    """`trunk` without its lowest `start` layers, inside the block."""
    layers, types = trunk.layers, getattr(trunk.config, "layer_types", None)
    trunk.layers = nn.ModuleList(layers[start:])
    if types:
        trunk.config.layer_types = types[start:]
    try:
        yield
    finally:
        trunk.layers = layers
        if types:
            trunk.config.layer_types = types


def shared_depth(*lms: CausalLM) -> int:
    """How many of the lowest layers are frozen and equal, bit for bit, in all models; 0 if the embedding is not."""
    trunks = [_trunk(lm) for lm in lms]
    if not _same_and_frozen([t.embed_tokens for t in trunks]):
        return 0
    levels = zip(*(t.layers for t in trunks), strict=False)
    return next(
        (i for i, modules in enumerate(levels) if not _same_and_frozen(modules)), min(len(t.layers) for t in trunks)
    )


def _same_and_frozen(modules: Sequence[nn.Module]) -> bool:
    states = [dict(m.named_parameters()) for m in modules]
    if any(p.requires_grad for state in states for p in state.values()):
        return False
    first = states[0]
    return all(
        state.keys() == first.keys() and all(torch.equal(p, first[k]) for k, p in state.items()) for state in states[1:]
    )


class FrozenStateCache:
    """Frozen states by row of tokens, computed once and kept in host memory: for every variant, epoch and validation.

    Call it with a batch to get the states [B, L, H] of its rows, padded with zeros.
    """

    def __init__(self, layers: FrozenLayers):
        self.layers = layers
        self._rows: dict[bytes, Tensor] = {}

    def __call__(self, batch: Batch) -> FrozenStates:
        where, cut = batch.input_ids.device, list(enumerate(batch.lengths))
        # Positions show where a response begins, so equal keys mean equal rows.
        keys = [torch.stack([batch.input_ids[i, :n], batch.positions[i, :n]]).cpu().numpy().tobytes() for i, n in cut]
        if any(key not in self._rows for key in keys):
            states = self.layers(batch.input_ids, batch.attention_mask, batch.positions).states
            self._rows |= {key: states[i, :n].cpu() for key, (i, n) in zip(keys, cut, strict=True)}
        rows = [self._rows[key].to(where) for key in keys]
        return FrozenStates(self.layers.depth, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
