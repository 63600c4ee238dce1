"""Kinds of work that a stage consists of, counted, and how many floating-point operations a pass takes.

The ranks of a stage work side by side, so every count is that of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.plan.shapes import Shape

Trained = Literal["weights", "lora"]


@dataclass(frozen=True, slots=True)
class Pass:
    """Calls of some layers of a model on padded rows, forward only or forward and backward.

    FLOPs of a forward pass per token and layer: 2 x parameters of the linear maps + 4 x heads x head_dim x length,
    since scores and weighted values take 2 x length x head_dim each per head. Backward takes twice that where weights
    are trained (gradients of inputs and of weights), and once where only adapters are (gradients of inputs).
    """

    shape: Shape
    calls: float
    tokens: float
    """Of one call, padding included."""
    length: float
    """Of a row."""
    layers: int
    """That are run."""
    trained: Trained | None = None
    """What is trained in these layers; None: a forward pass."""
    zero: int | None = None
    """ZeRO stage of the engine that runs it; None: no engine, or one that shards nothing."""
    ranks: int = 1

    @property
    def flops(self) -> float:
        """Of all calls."""
        attention = 4 * self.shape.heads * self.shape.head_dim * self.length
        factor = {None: 1, "lora": 2, "weights": 3}[self.trained]
        forward = 2 * self.shape.linear_params + attention
        return factor * self.calls * self.tokens * self.layers * forward


@dataclass(frozen=True, slots=True)
class Logits:
    """The LM head on some tokens: 2 x hidden x vocabulary FLOPs each; backward once more where the head is frozen,
    twice where it is trained."""

    shape: Shape
    calls: float
    tokens: float
    """Of one call."""
    backward: bool = False
    head_trained: bool = False
    zero: int | None = None
    ranks: int = 1

    @property
    def flops(self) -> float:
        factor = 1 + self.backward * (1 + self.head_trained)
        return factor * self.calls * self.tokens * 2 * self.shape.head_params


@dataclass(frozen=True, slots=True)
class Update:
    """Optimiser steps."""

    calls: float
    params: float
    """That are trained, of the whole model."""
    zero: int
    ranks: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Calls of vLLM's `generate` on one rank."""

    shape: Shape
    calls: float
    sequences: float
    """Of one call."""
    prompts: float
    """Distinct prompts of one call: their keys and values are shared in whole blocks."""
    prompt_tokens: float
    new_tokens: float
    """Mean of a response."""
    max_new_tokens: int
    concurrency: int
    """Most sequences that are decoded together."""
    block: int
    """Tokens of a block of the KV cache."""
    ranks: int = 1
    graphs: bool = False
    """vLLM compiles the model and captures CUDA graphs (`generation.vllm.enforce_eager: false`)."""

    @property
    def steps(self) -> float:
        """Decoding steps of one call: all sequences in waves of `concurrency`, and the tail of the longest ones."""
        waves = max(1.0, self.sequences / self.concurrency)
        return waves * self.new_tokens + (self.max_new_tokens - self.new_tokens)

    @property
    def tokens(self) -> float:
        """New tokens of one call."""
        return self.sequences * self.new_tokens

    @property
    def prefill(self) -> float:
        """Prompt tokens of one call that are computed: whole blocks once a prompt, the rest for each sequence."""
        rest = min(self.prompt_tokens, 1 + self.prompt_tokens % self.block)
        return self.prompts * self.prompt_tokens + (self.sequences - self.prompts) * rest


@dataclass(frozen=True, slots=True)
class Read:
    """Log-probs of given tokens by vLLM."""

    shape: Shape
    calls: float
    tokens: float
    """Of one call."""
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Gather:
    """Whole weights, gathered from the ranks with adapters merged in; given to vLLM, or to be saved."""

    shape: Shape
    calls: float
    zero: int | None
    ranks: int = 1
    to_vllm: bool = False


@dataclass(frozen=True, slots=True)
class Kl:
    """Exact KL of next-token distributions, LM heads included (`pipelines.policy_kl`)."""

    shape: Shape
    tokens: float
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Judge:
    """Responses scored by the built-in gold model."""

    samples: float
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Load:
    """Models read from disk, with the checks of loading."""

    calls: float
    params: float
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Start:
    """Something that is started once: a library, an engine."""

    what: Literal["command", "process", "tokenizer", "vllm", "deepspeed", "engine", "judge"]
    """command: what `grm` does itself before it starts a stage. process: a stage's process up to its imports.
    tokenizer: the first tokenizer, for which transformers is imported."""
    count: float = 1
    ranks: int = 1
    graphs: bool = False
    """Of vLLM, as in `Sample`."""


@dataclass(frozen=True, slots=True)
class Write:
    """Files."""

    bytes: float


@dataclass(frozen=True, slots=True)
class Fixed:
    """Seconds that are known: timed while planning, or taken from a finished run."""

    seconds: float
    basis: str


Item = Pass | Logits | Update | Sample | Read | Gather | Kl | Judge | Load | Start | Write | Fixed
