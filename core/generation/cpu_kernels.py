"""vLLM's own fused kernels for a norm and a gated activation, used on CPU too.

vLLM builds them for CPUs, and on x86 computes the same from eight operations of torch a layer: it expects them to be
fused by a compiler, which takes a minute to start. Without that they are a sixth of the time of sampling from a small
model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

PROVIDER = "grm_cpu"
"""Name of these kernels in vLLM's table."""
NORMS = ("rms_norm", "fused_add_rms_norm")


@cache
def fused_kernels() -> dict[str, Any]:
    """Register the kernels; arguments of `vllm.LLM` that have them used. Nothing where vLLM was built without them."""
    from vllm import ir
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    kernels = torch.ops._C
    if not all(hasattr(kernels, name) for name in (*NORMS, "silu_and_mul")):
        return {}

    def takes(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
        return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()

    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        out = torch.empty_like(x)
        kernels.rms_norm(out, x, weight, epsilon)
        return out

    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        kernels.fused_add_rms_norm(x, x_residual, weight, epsilon)  # in place
        return x, x_residual

    ir.ops.rms_norm.register_impl(
        PROVIDER, supports_args=lambda x, weight, epsilon, variance_size=None: takes(x, weight, variance_size)
    )(rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(
        PROVIDER,
        supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: (
            takes(x, weight, variance_size) and x_residual.is_contiguous()
        ),
        inplace=True,
    )(fused_add_rms_norm)

    @SiluAndMul.register_oot
    class FusedSiluAndMul(SiluAndMul):
        def forward_cpu(self, x: Tensor) -> Tensor:
            out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
            kernels.silu_and_mul(out, x)
            return out

    return {"kernel_config": {"ir_op_priority": {name: [PROVIDER] for name in NORMS}}}
