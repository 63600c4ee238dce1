"""A configuration and the sizes of tiny models, for tests of `grm plan`. No model is read."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from core.config import Config
from pipelines.plan.lengths import Lengths
from pipelines.plan.shapes import Shape, measured
from pipelines.plan.sizes import Sizes

TINY = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
ENGINE = {"processes": 2, "dtype": "bfloat16"}


def tiny_shape(**changes: Any) -> Shape:
    return measured(LlamaConfig(**TINY | {"tie_word_embeddings": True} | changes), "tiny", "test")


def lengths(**changes: Any) -> Lengths:
    """10 prompts of each split but 64 of rm_train; prompts of 20 tokens, responses of 12."""
    values: dict[str, Any] = dict(
        prompts=dict(rm_train=64, rm_val=10, rl_train=10, calibration=10, eval=10), prompt_tokens=20.0,
        response_tokens=12.0, pair_tokens=(20.0, 12.0), pairs=dict(rm_train=64, rm_val=10), prompt_draws=[20],
        response_draws=[12], calibration=10, seconds=0.5,
    )  # fmt: skip
    return Lengths(**values | changes)


def sizes(
    shape: Shape | None = None, ranks: int = 2, known: Lengths | None = None, gpu_memory: float | None = None,
    **sections: Any,
) -> Sizes:  # fmt: skip
    """Of a configuration with these sections."""
    shape = shape or tiny_shape()
    names = list(sections.get("rm", {}).get("variants", {"grm": None}))
    sections["ppo"] = {"proxy": names[0]} | sections.get("ppo", {})
    cfg = Config.model_validate({"engine": ENGINE | {"processes": ranks}, **sections})
    return Sizes(cfg, known or lengths(), shape, shape, None, ranks, gpu_memory)
