"""Which attention kernel computes what an architecture says."""

from __future__ import annotations

import inspect
from typing import Any

from core.config import Attention
from core.errors import ArtefactError
from core.models.architecture import text_config


def attention_kernel(config: Any, asked: Attention, path: str) -> str | None:
    """The kernel to load a model with; None leaves it to transformers: sdpa where the architecture has it, else eager.

    Args:
        config: of the model, in transformers' form.
        asked: the user's choice.
        path: of the model, for the message.

    Raises:
        ArtefactError: the kernel that was asked for computes something else.
    """
    cap = soft_cap(config)
    if asked == "auto":
        return None if cap is None or _honours_soft_cap("sdpa") else "eager"
    if cap is not None and asked != "eager" and not _honours_soft_cap(asked):
        raise ArtefactError(
            f"{path} caps its attention scores at {cap:g} (attn_logit_softcapping), which the kernel {asked} leaves "
            "out: set attention to eager, or to auto, which chooses it"
        )
    return asked


def soft_cap(config: Any) -> float | None:
    """Where the architecture caps its attention scores, as Gemma-2 does; None where it does not."""
    return getattr(text_config(config), "attn_logit_softcapping", None)


def _honours_soft_cap(kernel: str) -> bool:
    """transformers hands the cap to every kernel as `softcap`, and sdpa drops it without a word."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return "softcap" in inspect.signature(ALL_ATTENTION_FUNCTIONS[kernel]).parameters
