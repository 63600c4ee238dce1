"""The whole configuration of a run: one frozen tree, every field with its meaning.

Import all sections from `core.config`. YAML files are laid over each other and dotted overrides come last
(`core.config.load`). Values are checked here, once; past
`load()` a config is complete and consistent. Numbers that follow from others (accumulation, rollouts a rank) are
properties, not fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config.base import NATIVE_DTYPE, Model, Section
from core.config.data import Data, Generation, Gold, Preferences
from core.config.ppo import Ppo
from core.config.rm import RewardTraining


class Run(Section):
    name: str = "offline"
    """Folder of the run below `dir`."""
    dir: Path = Path("runs")
    """Where runs are kept."""
    seed: int = Field(1, ge=0)
    """Every random draw of every stage derives from this number."""


class BestOfN(Section):
    samples: int = Field(16, ge=2)
    """N, the pool of each prompt. Curves are shown up to N, trusted up to N / 4."""
    n_max: int | None = Field(None, ge=1)
    """Largest n of the curves (null: N)."""
    prompts: int | None = Field(None, ge=2)
    """Use the first so many evaluation prompts by hash (null: all)."""
    shard_prompts: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _n_fits(self) -> BestOfN:
        if self.n_max and self.n_max > self.samples:
            raise ValueError(f"n_max {self.n_max} exceeds the pool of {self.samples} samples: raise bon.samples")
        return self


class Engine(Section):
    """DeepSpeed: how training is spread over processes."""

    processes: int | Literal["auto"] = "auto"
    """Ranks on this machine. auto: one per GPU, or two on CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    dtype: Literal["bfloat16", "float32"] = NATIVE_DTYPE
    """Default: what the machine computes fast. bfloat16 keeps float32 master weights in the optimiser."""
    offload: bool = False
    """Keep optimiser states (and at stage 3 parameters) in host memory."""
    gradient_checkpointing: bool = False
    overrides: dict = {}
    """A user's own DeepSpeed settings, merged over the derived ones."""


class Evaluation(Section):
    prompts: int | None = Field(None, ge=2)
    """Use the first so many evaluation prompts by hash (null: all)."""
    samples: int = Field(1, ge=1)
    """Responses per prompt and checkpoint, at the training temperature."""
    micro_batch: int = Field(8, ge=1)
    """Sequences per forward pass of the KL measurement."""
    bootstrap: int = Field(1000, ge=100)
    """Draws of the cluster bootstrap over prompts."""


class Study(Section):
    """The matrix of `grm study`: each variant with each data size, model size, label noise and seed."""

    variants: tuple[str, ...] = ()
    """Names of rm.variants (empty: all of them)."""
    seeds: int = Field(3, ge=1)
    """Heads and orders of the pairs; 3 is the least that says something of a method."""
    pairs: tuple[int, ...] = ()
    """Training pairs (empty: all)."""
    layers: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Sizes of the reward model: the first so many layers of its base (empty: rm.num_layers, or the variant's own)."""
    label_noise: tuple[Annotated[float, Field(ge=0, le=0.5)], ...] = (0.0,)
    ensembles: tuple[str, ...] = ("mean", "min")
    """Combiners of the seeds of a condition, from their scores: no model is run for them."""
    sweep: tuple[str, ...] = (
        "mean", "min", "median", "quantile:0.25", "uwo:0.1", "uwo:0.5", "uwo:1", "uwo:2", "length:0.1", "length:0.3",
    )  # fmt: skip
    """Combiners that are compared at one n, from the same scores, so no model is run (`study.analysis.combiners`)."""
    second_gold: Gold | None = None
    """Scores the pools too, after everything is trained: whether the verdicts are those of one gold alone."""
    soft_temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    """Of soft best-of-n, in standard deviations of the proxy within prompts (empty: none)."""
    ppo_variants: tuple[str, ...] = ()
    """Variants that policies are trained against (empty: none)."""
    ppo_label_noise: tuple[Annotated[float, Field(ge=0, le=0.5)], ...] = ()
    """Label noises of the reward models that policies are trained against (empty: all of label_noise)."""
    ppo_layers: tuple[int, ...] = ()
    """Sizes of the reward models that policies are trained against (empty: all of layers)."""
    ppo_seeds: int = Field(1, ge=1)
    """Train policies against the first n seeds of each of these conditions."""
    kl_coefs: tuple[float, ...] = (0.02,)

    @model_validator(mode="after")
    def _once(self) -> Study:
        axes = {name: value for name, value in self if isinstance(value, tuple) and len(set(value)) < len(value)}
        if axes:
            raise ValueError("; ".join(f"{name} {list(value)} has an entry twice" for name, value in axes.items()))
        return self


class Config(Section):
    run: Run = Run()
    policy: Model = Model()
    data: Data = Data()
    generation: Generation = Generation()
    gold: Gold = Gold()
    preferences: Preferences = Preferences()
    rm: RewardTraining = RewardTraining()
    bon: BestOfN = BestOfN()
    ppo: Ppo = Ppo()
    engine: Engine = Engine()
    eval: Evaluation = Evaluation()
    study: Study = Study()

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        faults = []
        for name in self.ppo.members:
            if name not in self.rm.variants:
                which = "ppo.ensemble.members" if self.ppo.ensemble else "ppo.proxy"
                faults.append(f"{which} {name!r} is none of rm.variants ({', '.join(self.rm.variants)})")
        longest = self.data.max_prompt_tokens + self.generation.max_new_tokens
        if longest > self.generation.vllm.max_model_len:
            faults.append(
                f"generation.vllm.max_model_len {self.generation.vllm.max_model_len} is below data.max_prompt_tokens"
                f" + generation.max_new_tokens = {longest}"
            )
        if self.ppo.sync == "adapter" and self.engine.dtype != self.generation.vllm.dtype:
            faults.append(
                f"ppo.sync adapter rounds nothing where both sides have one type: engine.dtype is {self.engine.dtype}, "
                f"generation.vllm.dtype {self.generation.vllm.dtype}"
            )
        if self.engine.processes != "auto":
            faults += self.batch_faults(self.engine.processes)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def batch_faults(self, world: int) -> list[str]:
        """What does not divide on `world` ranks, one line each; empty when all is well."""
        rules = [
            ("rm.global_batch", self.rm.global_batch, "engine.processes x rm.micro_batch", world * self.rm.micro_batch),
            (
                "ppo.rollouts",
                self.ppo.rollouts,
                "engine.processes x ppo.micro_batch x ppo.minibatches",
                world * self.ppo.micro_batch * self.ppo.minibatches,
            ),
            (
                "ppo.rollouts",
                self.ppo.rollouts,
                "engine.processes x ppo.samples_per_prompt",
                world * self.ppo.samples_per_prompt,
            ),
        ]
        return [
            f"{name} {value} is not divisible by {parts} = {divisor}"
            for name, value, parts, divisor in rules
            if value % divisor
        ]
