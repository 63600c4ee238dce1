"""What sections of the configuration have in common, and those that several stages read."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.environment import may_have_gpu

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]
"""Attention kernels of transformers; auto is sdpa wherever that computes what the architecture says, else eager."""


def native_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 on a GPU and on CPUs with instructions for it; float32 elsewhere, where bfloat16 is emulated and some
    ten times slower."""
    if may_have_gpu():
        return "bfloat16"
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(words) else "float32"


NATIVE_DTYPE = native_dtype()


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )


def exact_div(numerator: int, denominator: int, what: str) -> int:
    """Integer quotient; raises ValueError naming `what` when it is not exact."""
    if denominator <= 0 or numerator % denominator:
        raise ValueError(f"{what}: {numerator} is not divisible by {denominator}")
    return numerator // denominator


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, key by key, at every depth."""
    laid = {
        k: merge(base[k], v) if isinstance(base.get(k), dict) and isinstance(v, dict) else v for k, v in extra.items()
    }
    return {**base, **laid}


class Lora(Section):
    rank: int = Field(default=16, ge=1)
    """Rank of the two factors of each adapter. A higher rank trains more parameters."""
    alpha: float = Field(default=32.0, gt=0)
    """What an adapter adds to its weight is multiplied by alpha / rank. Twice the rank is usual."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapters' inputs while reward models are trained. PPO refuses it: the probability ratio of an
    unchanged policy would differ from 1."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter. The default stands for all linear layers: where an architecture
    names them otherwise (GPT-2, Pythia, OPT, Phi-3), all that it has are taken."""
    top_layers: int | None = Field(default=None, ge=1)
    """Put adapters on the last n layers only (null: on all of them). The backward pass ends there, so this saves
    time."""


class Model(Section):
    path: str = "models/SmolLM2-135M-Instruct"
    """A local folder or a hub id of a causal LM with a chat template."""
    revision: str | None = None
    """Hub revision: a commit, tag or branch (null: the newest). Pin one for a run that other people should repeat."""
    attention: Attention = Field(default="auto", json_schema_extra={"formerly": "sdpa"})
    """Attention kernel of the trainer. auto: sdpa, or eager for architectures that cap attention scores (Gemma-2),
    which sdpa leaves out. On CPU a kernel of our own, which leaves padding out, takes its place wherever it computes
    the same."""
    chat_template: str | None = None
    """Chat template in place of the model's own: a Jinja file, or the name of one of TRL's templates, such as
    `qwen3_training` (null: the model's own). Saved models keep it."""
    template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as `enable_thinking: false`. Saved models keep them in their template."""
    chat_date: date | None = None
    """Today's date, for chat templates that write it, as 2024-07-26: with the true date the same chat would have other
    tokens each day (null: the date that the model was saved with, else 2024-07-26)."""
    generation_prompt: Literal["auto", "template", "answer"] = "auto"
    """What responses begin after. template: the generation prompt of the chat template, where some models think first.
    answer: what the template writes before an answer, such as an empty thought. auto: both must agree, unless the
    template has no generation prompt at all."""
    system_turn: Literal["auto", "first_user", "refuse"] = "auto"
    """What becomes of a system turn. auto: the chat template renders it, or where it cannot, the text is put before
    the first user turn. first_user: always put there. refuse: an error where the template cannot render it."""
    pad_token: str | None = None
    """Special token that fills rows; it must not end turns (null: the tokenizer's own, or one that is made for it)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model, which some architectures need. Only for publishers you trust."""


class Optim(Section):
    """AdamW with a schedule."""

    lr: float = Field(default=1e-5, gt=0)
    """Learning rate at the end of the warm-up. The configurations that are shipped use 1e-4 to 1e-3 for the 135M model
    and 1e-5 for gemma-2b."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay per step of AdamW's running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean squared gradient before AdamW divides by it. 1e-5 is usual in PPO: where
    gradients are tiny, it keeps steps small."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay: each step shrinks the trained weights by lr * weight_decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up: constant, or falling to 0 at the last step in a line or a half
    cosine."""
    warmup: Fraction = 0.03
    """Share of the optimiser steps over which lr rises from 0, at every schedule."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm, taken over all trained weights, when theirs is larger."""
    skip_above: float | None = Field(default=None, gt=0)
    """Leave out an update whose gradient norm is more than this many standard deviations above the mean of the last 128
    norms (null: make every update). OLMo 2 trains with 6 (arXiv 2501.00656). Nothing is left out before 16 norms are
    known. What was left out is counted in the metrics."""
