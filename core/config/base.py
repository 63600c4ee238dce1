"""What sections of the configuration have in common, and those that several stages read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Dtype = Literal["bfloat16", "float16", "float32"]


def native_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 on a GPU and on CPUs with instructions for it; float32 elsewhere, where bfloat16 is emulated and some
    ten times slower."""
    if any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd")):
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


class Lora(Section):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    """Active in reward-model training only: in PPO it would make the ratio of an unchanged policy differ from 1."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""
    top_layers: int | None = Field(None, ge=1)
    """Adapters on the last so many layers only (null: on all); backward stops there."""


class Model(Section):
    path: str = "models/SmolLM2-135M-Instruct"
    """A local folder or a hub id of a causal LM with a chat template."""
    revision: str | None = None
    """Hub revision (commit, tag or branch); pin one for a run that others shall repeat."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention kernel of the trainer. On CPU `eager` trains some 10% faster at a few hundred tokens."""
    trust_remote_code: bool = False


class Optim(Section):
    lr: float = Field(1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Fraction = 0.03
    """Share of the steps over which lr rises from 0."""
    max_grad_norm: float = Field(1.0, gt=0)
