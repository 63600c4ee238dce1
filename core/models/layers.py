"""Hidden states of causal language models; frozen layers that several models share, and a cache of their states."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.batching import attended
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.architecture import layers_of, stack_of, surroundings, trunk_of
from core.models.unpadded import Joined, attention_within
from core.training.sharding import gathered

SKIPS_PADDING = "skips_padding"
"""Attribute of a trunk: whether it computes the same on real tokens laid end to end."""


def train_top_layers(lm: CausalLM, count: int | None) -> None:
    """Freeze all but the top `count` layers and what follows them (the final norm).

    None leaves everything as it is, 0 freezes all.

    Raises:
        ArtefactError: `lm` has fewer layers.
    """
    if count is None:
        return
    stack = stack_of(trunk_of(lm))
    layers = stack.layers
    if count > len(layers):
        raise ArtefactError(f"trainable_layers {count} exceeds the model's {len(layers)} layers")
    lm.requires_grad_(False)
    if count:
        above = _surroundings(lm).above
        for module in (*layers[len(layers) - count :], *(getattr(stack.owner, name) for name in above)):
            module.requires_grad_(True)


class FrozenStates(NamedTuple):
    """What the lowest `depth` layers, frozen and shared, computed: a model continues from there."""

    depth: int
    states: Tensor  # [B, L, H]
    lower: tuple[FrozenStates, ...] = ()
    """The same of fewer layers, for models that share only those."""

    @property
    def levels(self) -> tuple[FrozenStates, ...]:
        return (*self.lower, self)


def states_at(frozen: FrozenStates | None, depth: int) -> FrozenStates | None:
    """The states of just `depth` layers; None where there are none, or for 0 layers."""
    return next((level for level in frozen.levels if level.depth == depth), None) if frozen and depth else None


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
        attention_mask: [B, L], 0 on padding and 1 on real tokens. In shared rows (`core.batching.pack`; not with flash
            attention) 1 on the prompt and 2, 3, ... on its responses.
        positions: [B, L]; by default they follow the mask, so that left and right padding agree.
        frozen: states of the lowest layers, by `FrozenLayers`; those layers are then not run.

    Returns:
        What stands at padding has no meaning.

    Raises:
        ValueError: shared rows with flash attention.
    """
    inputs = {"input_ids": input_ids} if frozen is None else {"inputs_embeds": frozen.states}
    depth = frozen.depth if frozen else 0
    return _states(trunk_of(lm), inputs, attention_mask, positions, lambda output: [output], depth=depth)[0]


def _states(
    trunk: CausalLM,
    inputs: dict[str, Tensor],
    mask: Tensor,
    positions: Tensor | None,
    taken: Callable[[Tensor], list[Tensor]],
    *,
    depth: int = 0,
) -> list[Tensor]:
    """States [B, L, H] of one pass.

    Args:
        taken: chooses the states after the pass; it is given what comes out of the trunk.
        depth: how many of the lowest layers have been run; `inputs` are then their states.
    """
    if positions is None:
        positions = ((mask > 0).cumsum(-1) - 1).clamp(min=0)
    if not mask.is_cuda and _skips_padding(trunk):
        joined = Joined.of(mask)
        one_row = {name: x.flatten(0, 1)[joined.real][None] for name, x in inputs.items()}
        with attention_within(trunk, joined.segments):
            output = _run(trunk, one_row, None, positions.flatten()[joined.real][None], depth)
        return [_into_rows(found[0], joined.real, mask) for found in taken(output)]
    return taken(_run(trunk, inputs, _for_kernel(trunk, mask), positions, depth))


def _into_rows(found: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """States [T, H] of the real tokens, put where these are in [B, L, H]."""
    states = found.new_zeros(mask.numel(), found.shape[-1]).index_copy(0, real, found)
    return states.view(*mask.shape, -1)


def _run(trunk: CausalLM, inputs: dict[str, Tensor], mask: Tensor | None, positions: Tensor, depth: int) -> Tensor:
    options = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    # Some architectures have no positions (ALiBi, recurrent layers).
    known = inspect.signature(trunk.forward).parameters
    options = {name: x for name, x in options.items() if name in known}
    if not depth:
        return trunk(**inputs, **options)[0]
    with _continued_from(trunk, FrozenStates(depth, inputs["inputs_embeds"])):
        return trunk(**inputs, **options)[0]


def _for_kernel(trunk: CausalLM, mask: Tensor) -> Tensor:
    """The mask as the attention kernel takes it: [B, L], or for shared rows what is added to scores [B, 1, L, L]."""
    if mask.max() <= 1:
        return mask
    if trunk.config._attn_implementation.startswith("flash"):
        raise ValueError("flash attention takes no mask of shared prompts: use sdpa, or give rows of one response")
    dtype = next(trunk.parameters()).dtype
    allowed = attended(mask)
    additive = torch.zeros(allowed.shape, dtype=dtype, device=mask.device)
    return additive.masked_fill(~allowed, torch.finfo(dtype).min)


def skips_padding(lm: CausalLM) -> bool:
    """Whether `hidden_states` of this model leaves padding out, so that the cost of a batch is that of its real tokens.

    On CPU, where `core.models.agreement.skip_padding` has found that this computes the same. Not with gradient
    checkpointing, which runs layers again after the pass.
    """
    return _skips_padding(trunk_of(lm)) and next(lm.parameters()).device.type == "cpu"


def _skips_padding(trunk: CausalLM) -> bool:
    if not getattr(trunk, SKIPS_PADDING, False):
        return False
    return not (trunk.training and any(getattr(m, "gradient_checkpointing", False) for m in trunk.modules()))


class FrozenLayers(nn.Module):
    """The embedding and the lowest `depth` layers of `lm`, frozen.

    Models that differ only above them can share what they compute. The parameters are those of `lm`, not copies.

    Args:
        lower: smaller depths, whose states are wanted too.

    Raises:
        ArtefactError: its layers are not a list of its trunk, so that they cannot be taken out.
    """

    def __init__(self, lm: CausalLM, depth: int, *, lower: Iterable[int] = ()):
        super().__init__()
        self.depth = depth
        whole = trunk_of(lm)
        name = _own_stack(whole)
        layers = getattr(whole, name)
        trunk = copy.copy(whole)
        trunk._modules = dict(trunk._modules)  # a shallow copy shares the table of submodules
        run = list(layers[:depth])
        # In a dict, which torch does not look into: these modules are in the trunk.
        self._keeps = {d: _KeepsOutput(layers[d - 1]) for d in sorted({*lower, depth})}
        for d, keeps in self._keeps.items():
            run[d - 1] = keeps
        setattr(trunk, name, nn.ModuleList(run))
        self.trunk = trunk
        for module in (trunk.get_input_embeddings(), *layers[:depth]):
            module.requires_grad_(False)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> FrozenStates:
        """The states after the last of these layers, and of the lower depths; inputs as in `hidden_states`."""
        taken = lambda _: [keeps.taken() for keeps in self._keeps.values()]  # noqa: E731
        states = _states(self.trunk, {"input_ids": input_ids}, attention_mask, positions, taken)
        *lower, deepest = (FrozenStates(d, x) for d, x in zip(self._keeps, states, strict=True))
        return deepest._replace(lower=tuple(lower))

    @torch.no_grad()
    def check(self, lm: CausalLM, depth: int | None = None) -> None:
        """Check on one row that `lm`, continued from these layers, computes what it computes whole.

        Args:
            depth: where `lm` continues; by default above all of these layers.

        Raises:
            ArtefactError: it does not.
        """
        ids = torch.arange(3, 19, device=next(lm.parameters()).device)[None]
        mask = torch.ones_like(ids)
        whole = hidden_states(lm, ids, mask)
        try:
            split = hidden_states(lm, ids, mask, frozen=states_at(self(ids, mask), depth or self.depth))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # of the model's own code
            raise ArtefactError(f"{_uncut(lm, depth or self.depth)} ({type(error).__name__}: {error})") from None
        if not torch.allclose(whole, split, rtol=0.02, atol=0.02 * float(whole.abs().mean())):
            raise ArtefactError(_uncut(lm, depth or self.depth))


def _uncut(lm: CausalLM, depth: int) -> str:
    return (
        f"the first {depth} layers of {lm.config.name_or_path} are not those of the base model, or its architecture "
        "cannot be cut there: set rm.cache_frozen_layers and ppo.reuse_frozen_layers to false"
    )


def frozen_layers_of(base: CausalLM, depth: int, *lms: CausalLM) -> FrozenLayers | None:
    """The lowest `depth` layers of `base`, which all of `lms` continue; None, with a line in the log, where the
    architecture cannot be cut there. To use none is slower and computes the same."""
    return frozen_levels_of(base, *((lm, depth) for lm in lms or [base]))


def frozen_levels_of(base: CausalLM, *continued: tuple[CausalLM, int]) -> FrozenLayers | None:
    """The lowest layers of `base`, for models that continue them at depths of their own; None as `frozen_layers_of`."""
    depths = {depth for _, depth in continued}
    try:
        layers = FrozenLayers(base, max(depths), lower=depths)
        for lm, depth in continued:
            layers.check(lm, depth)
    except ArtefactError as error:
        logging.getLogger(__name__).warning("frozen layers are not shared: %s", error)
        return None
    return layers


class _Around(nn.Module):
    """Stands for a layer in its trunk."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:  # some trunks ask a layer for the kind of its attention
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class _KeepsOutput(_Around):
    """A layer that keeps what it computed until it is taken."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self._output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        self._output = output[0] if isinstance(output, tuple) else output
        return output

    def taken(self) -> Tensor:
        assert self._output is not None
        output, self._output = self._output, None
        return output


class _Continues(_Around):
    """A layer that is given `states` in place of what the modules below it computed.

    Args:
        after: the states are what comes out of the layer, not what goes in.
    """

    def __init__(self, layer: nn.Module, states: Tensor, *, after: bool):
        super().__init__(layer)
        self._states, self._after = states, after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("hidden_states", None)
        output = self.layer(self._states, *args[1:], **kwargs)
        if not self._after:
            return output
        return (self._states, *output[1:]) if isinstance(output, tuple) else self._states


def _own_stack(trunk: CausalLM) -> str:
    """The name of the trunk's list of layers; ArtefactError where a module inside holds it."""
    stack = stack_of(trunk)
    if stack.owner is not trunk:
        raise ArtefactError(f"the layers of {trunk.config.model_type} are not a list of its trunk")
    return stack.name


def _surroundings(lm: CausalLM):
    return surroundings(lm, lambda ids, mask: hidden_states(lm, ids, mask))


@contextmanager
def _continued_from(trunk: CausalLM, frozen: FrozenStates) -> Iterator[None]:
    """`trunk` without its lowest layers, inside the block; whatever it embeds, its layers go on from `frozen`."""
    name = _own_stack(trunk)
    layers, types = getattr(trunk, name), getattr(trunk.config, "layer_types", None)
    # Where all layers are frozen, the last one is run once more, because something has to stand there.
    start = min(frozen.depth, len(layers) - 1)
    first = _Continues(layers[start], frozen.states, after=start < frozen.depth)
    setattr(trunk, name, nn.ModuleList([first, *layers[start + 1 :]]))
    if types:
        trunk.config.layer_types = types[start:]
    try:
        yield
    finally:
        setattr(trunk, name, layers)
        if types:
            trunk.config.layer_types = types


@torch.no_grad()
def shared_depth(*lms: CausalLM) -> int:
    """How many of the lowest layers are frozen and equal, bit for bit, in all models; 0 if the embedding is not.

    Whatever runs before the layers belongs to the embedding, for example the embeddings of positions.
    """
    owners = [stack_of(trunk_of(lm)).owner for lm in lms]
    below = _surroundings(lms[0]).below
    if any(not hasattr(owner, name) for owner in owners for name in below):
        return 0
    if not all(_same_and_frozen([getattr(owner, name) for owner in owners]) for name in below):
        return 0
    stacks = [layers_of(lm) for lm in lms]
    levels = zip(*stacks, strict=False)
    return next((i for i, modules in enumerate(levels) if not _same_and_frozen(modules)), min(map(len, stacks)))


def _same_and_frozen(modules: Sequence[nn.Module]) -> bool:
    states = [dict(m.named_parameters()) for m in modules]
    if any(p.requires_grad for state in states for p in state.values()):
        return False
    first = states[0]
    return all(
        state.keys() == first.keys() and all(_equal(first[k], p) for k, p in state.items()) for state in states[1:]
    )


def _equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    with gathered([one, other]):
        return torch.equal(one, other.to(one.device))
