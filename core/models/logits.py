"""From hidden states to logits: the LM head, and what an architecture does with its output."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import NATIVE_DTYPE
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.architecture import text_config, without_adapters

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Gemma-2 and its successors; RecurrentGemma; xLSTM."""
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Cohere; Falcon-H1; Muse."""
_DIVISORS = ("logits_scaling",)
"""Granite."""
_MULTIPLIED = ("hyperclovax",)
"""Model types that multiply by what Granite divides by."""


class LmHead(NamedTuple):
    """logits = cap * tanh(scale * linear(h) / cap), or scale * linear(h) without a cap.

    `core.models.agreement` proves for each model that is loaded that these are its own logits.
    """

    linear: Any  # a module; Any to a type checker, which takes the attributes of modules for tensors
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, lm: CausalLM) -> LmHead:
        config = text_config(lm.config)
        return cls(without_adapters(lm).get_output_embeddings(), _scale(config), _first(config, _CAPS))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., H]."""
        return after_head(self.linear(hidden), self.scale, self.cap)


def after_head(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """What follows the LM head, in float32."""
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _scale(config: Any) -> float:
    divisor = _first(config, _DIVISORS) or 1.0
    if config.model_type in _MULTIPLIED:
        divisor = 1.0 / divisor
    return (_first(config, _FACTORS) or 1.0) / divisor


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    values = [getattr(config, name, None) for name in names]
    return next((float(value) for value in values if value is not None), None)


class AbsentLmHead(nn.Module):
    """In place of an LM head that is not there; computing log-probs with it is an ArtefactError.

    Args:
        why: there is none; the end of a sentence about the model.
    """

    out_features = 1  # the size of no vocabulary

    def __init__(self, why: str):
        super().__init__()
        self.why = why

    def forward(self, hidden: Tensor) -> Tensor:
        raise ArtefactError(f"this model {self.why}, so it has no log-probs")


def has_lm_head(lm: CausalLM) -> bool:
    return not isinstance(without_adapters(lm).get_output_embeddings(), AbsentLmHead)


def leave_out_lm_head(lm: CausalLM) -> None:
    """Free the LM head of a model that is read for its hidden states alone, divided among ranks or not.

    A head that is tied to the embeddings takes no memory and stays.
    """
    base = without_adapters(lm)
    head = base.get_output_embeddings()
    if isinstance(head, AbsentLmHead):
        return
    inside = set(head.modules())
    elsewhere = {id(p) for part in base.modules() if part not in inside for p in part.parameters(recurse=False)}
    if not any(id(p) in elsewhere for p in head.parameters()):
        base.set_output_embeddings(AbsentLmHead("was loaded without its LM head"))


class Float32Head(nn.Linear):
    """An LM head whose logits are float32, whatever the type of its weights.

    A product of two bfloat16 numbers is exact in float32, so that nothing but the order of the sums is rounded. On a
    GPU its matrix units do that with 16-bit inputs and a float32 output. Elsewhere the weights are turned into float32
    a block of the vocabulary at a time. Gradients are computed in 16 bits where the machine is fast at that.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        return _Float32Product.apply(hidden, self.weight, self.bias)


def use_float32_head(lm: CausalLM) -> None:
    """Make the LM head of `lm` a `Float32Head`, with the same weights, tied or not.

    Raises:
        ArtefactError: its head is not a linear layer.
    """
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ArtefactError(
            f"{lm.config.name_or_path}: engine.float32_head needs a linear LM head, and this one is a "
            f"{type(head).__name__}: set engine.float32_head=false"
        )
    # In place, so that whatever holds the module or its weights (tying, ZeRO-3) still does.
    head.__class__ = Float32Head


class _Float32Product(torch.autograd.Function):
    """hidden W^T + b in float32, from tensors of any type."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        # The parameter itself is kept, so that ZeRO-3 can gather it again for the backward pass.
        ctx.save_for_backward(hidden, weight, bias)
        if _on_matrix_units(hidden, weight):
            flat = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32)
            logits = flat.view(*hidden.shape[:-1], -1)
            return logits if bias is None else logits + bias.float()
        logits = hidden.new_empty((*hidden.shape[:-1], weight.shape[0]), dtype=torch.float32)
        if _takes_two_products(hidden, weight):
            _two_products(hidden.flatten(0, -2), weight, logits.flatten(0, -2))
            return logits if bias is None else logits + bias.float()
        x = hidden.float()
        for at in _blocks(weight):
            logits[..., at] = F.linear(x, weight[at].float(), None if bias is None else bias[at].float())
        return logits

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, weight, bias = ctx.saved_tensors
        trained, flat = ctx.needs_input_grad[1], gradient.flatten(0, -2)
        of_bias = flat.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        if _gradients_in_16_bits(hidden, weight):  # as the backward pass of a head in 16 bits
            rounded = flat.to(weight.dtype)
            of_weight = rounded.T @ hidden.flatten(0, -2) if trained else None
            return (rounded @ weight).view_as(hidden), of_weight, of_bias
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        of_weight = torch.empty_like(weight) if trained else None
        x = hidden.float().flatten(0, -2)
        for at in _blocks(weight):
            of_hidden += gradient[..., at] @ weight[at].float()
            if of_weight is not None:
                of_weight[at] = (flat[:, at].T @ x).to(weight.dtype)
        return of_hidden.to(hidden.dtype), of_weight, of_bias


def _on_matrix_units(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16)


def _two_products(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x W^T in `out`, right to 2^-17 of the values, by CPU instructions for bfloat16.

    They round a product to bfloat16. A second product of the same, less the rounded one, is what the rounding left.
    """
    rows = max(64, (1 << 20) // max(1, len(x)))  # of the vocabulary, so that a block stays in a core's cache
    for start in range(0, len(weight), rows):
        at = slice(start, start + rows)
        rounded = x @ weight[at].T
        out[:, at].copy_(rounded).add_(torch.addmm(rounded, x, weight[at].T, beta=-1))


def _takes_two_products(hidden: Tensor, weight: Tensor) -> bool:
    return _on_vector_units(hidden, weight) and _adds_before_it_rounds()


def _gradients_in_16_bits(hidden: Tensor, weight: Tensor) -> bool:
    """Where products of 16 bits are faster: the gradients are rounded to 16 bits in the end anyway."""
    return _on_matrix_units(hidden, weight) or _on_vector_units(hidden, weight)


def _on_vector_units(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a CPU has instructions for the product."""
    on_cpu = hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.bfloat16
    return on_cpu and NATIVE_DTYPE == "bfloat16"


@cache
def _adds_before_it_rounds() -> bool:
    """Whether this CPU's product of bfloat16 matrices adds what is to be added in float32, and rounds the sum."""
    draws = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=draws).bfloat16() for _ in range(2))
    exact, rounded = x.double() @ weight.double(), x @ weight
    rest = torch.addmm(rounded, x, weight, beta=-1)
    return bool((rounded.double() + rest.double() - exact).abs().max() < (rounded.double() - exact).abs().max() / 32)


def _blocks(weight: Tensor) -> list[slice]:
    """Rows of the weight whose float32 copy takes 64 MiB."""
    rows = max(1, (1 << 24) // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]
