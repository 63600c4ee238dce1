"""Layers compiled by `torch.compile`, each by itself.

Norms, rotary positions and activations are then a few kernels in place of dozens. Compiling layers, not the whole
model, keeps the graphs small, and what wraps around layers here (states that other models share, checkpointing) stays
plain Python. Layers of one kind share what is compiled.
"""

from __future__ import annotations

import torch

from core.models import CausalLM
from core.models.architecture import layers_of, trunk_of
from core.models.layers import SKIPS_PADDING

FORMS = 64
"""Forms of one layer that torch may compile: with and without gradients, adapters or masks, for fixed and for any
lengths. After 8, which is torch's own limit, it would run the layer uncompiled without a word."""


def compile_layers(lm: CausalLM) -> None:
    """Compile the layers of `lm` when they are first run, and again for a new form of their inputs.

    On CPU its rows have padding from then on, as on a GPU: leaving it out would be a new form for every batch.
    """
    torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
    for layer in layers_of(lm):
        layer.compile()
    setattr(trunk_of(lm), SKIPS_PADDING, False)
