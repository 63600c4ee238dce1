"""Where in a forward pass numbers first become NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PASSED_OVER = ("attention_mask", "position_embeddings", "position_ids")
"""Inputs of layers that are no states: a mask may hold infinities."""


@dataclass
class Trace:
    """The modules whose outputs are not finite although their inputs are, innermost first, in the order of the pass."""

    modules: list[str] = field(default_factory=list)

    @property
    def first(self) -> str | None:
        """The first of them in words; None where all outputs were finite."""
        return self.modules[0] if self.modules else None


@contextmanager
def traced(module: nn.Module) -> Iterator[Trace]:
    """Watch all passes through `module` inside the block. Each output is read once, so it costs some time."""
    trace = Trace()
    hooks = [part.register_forward_hook(_look(name, trace), with_kwargs=True) for name, part in module.named_modules()]
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _look(name: str, trace: Trace) -> Callable[..., None]:
    def look(part: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if _is_finite(output):
            return
        if _is_finite([args, {k: x for k, x in kwargs.items() if k not in PASSED_OVER}]):
            trace.modules.append(f"{name or 'the whole model'} ({type(part).__name__}){_own_weights(part)}")

    return look


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list | tuple) else True


@torch.no_grad()
def _own_weights(part: nn.Module) -> str:
    bad = [
        f"{name}: {int((~weight.isfinite()).sum())} of {weight.numel()} numbers"
        for name, weight in part.named_parameters(recurse=False)
        if not _is_finite(weight)
    ]
    return f", whose weights are not finite ({', '.join(bad)})" if bad else ""


def gradients(module: nn.Module) -> tuple[bool, list[str]]:
    """Whether gradients of a module are not finite, or their norm is not; and which is nearest to the loss."""
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    bad = [name for name, grad in grads.items() if not grad.isfinite().all()]
    norm = torch.nn.utils.get_total_norm([grad.float() for grad in grads.values()])
    lines = [f"{len(bad)} of {len(grads)} gradients are NaN or infinite; the norm of all is {float(norm):g}"]
    return not bool(norm.isfinite()), lines + ([f"nearest to the loss: {bad[-1]}"] if bad else [])
