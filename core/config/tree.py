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

from core.config.base import Model, Section
from core.config.data import Data, Generation, Gold, Preferences
from core.config.engine import ENGINE_STAGES, Engine, EngineOfStage, EngineStage
from core.config.names import FolderPath
from core.config.ppo import Ppo
from core.config.rm import RewardTraining
from core.config.sft import Sft

CHAT_OPTIONS = ("chat_template", "template_kwargs", "chat_date", "generation_prompt", "system_turn", "pad_token")
"""Options of a model that decide which tokens a conversation becomes."""


class Run(Section):
    name: FolderPath = "offline"
    """Name of the run's folder within `dir`, where it stays: it has no `..` in it."""
    dir: Path = Field(default=Path("runs"), json_schema_extra={"decides_result": False})
    """Folder that holds the runs. Finished stages stay up to date where a run is moved."""
    seed: int = Field(default=1, ge=0)
    """Every random draw of every stage derives from this number."""


class BestOfN(Section):
    samples: int = Field(default=16, ge=2)
    """N, the samples in each prompt's pool. Curves reach up to n = N."""
    n_max: int | None = Field(default=None, ge=1)
    """Largest n of the curves (null: N)."""
    prompts: int | None = Field(default=None, ge=2)
    """Use only the first n evaluation prompts, in hash order (null: all)."""
    temperature: float | None = Field(default=None, gt=0)
    """Sampling temperature of the pools (null: generation.temperature). The GRM paper has 0.7. The KL of best-of-n is
    that from the distribution that the pools are sampled from. With another one than PPO's, pools and policies start
    from two distributions: their curves cannot be laid over each other, and the report says so."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most probable tokens of this total probability alone (1: from all). The GRM paper has 0.95. Below
    1 the same holds as for temperature."""
    shard_prompts: int = Field(default=64, ge=1)
    """Prompts of a shard, which one process samples between two writes to disk: an interrupted stage loses at most
    these. With several generation.processes, have at least one shard for each."""

    @model_validator(mode="after")
    def _n_fits(self) -> BestOfN:
        if self.n_max and self.n_max > self.samples:
            raise ValueError(f"n_max {self.n_max} exceeds the pool of {self.samples} samples: raise bon.samples")
        return self


class Evaluation(Section):
    prompts: int | None = Field(default=None, ge=2)
    """Use only the first n evaluation prompts, in hash order (null: all)."""
    samples: int = Field(default=1, ge=1)
    """Responses per prompt and checkpoint, at the training temperature. Those of a prompt are averaged, and intervals
    are over prompts: more of them help where samples differ more than prompts do."""
    shard_prompts: int | None = Field(default=None, ge=1)
    """Prompts of a checkpoint that one process samples at a time (null: all). Fewer of them give work to more processes
    than there are checkpoints; each of these processes loads the checkpoint."""
    micro_batch: int = Field(default=8, ge=1)
    """Sequences per forward pass when KL is measured. Lower it when memory runs out."""
    bootstrap: int = Field(default=1000, ge=100)
    """Draws of the bootstrap over prompts, which gives the intervals."""


class Study(Section):
    """The matrix of `grm study`: each variant with each data size, model size, label noise and seed."""

    variants: tuple[str, ...] = ()
    """Names of rm.variants (empty: all of them)."""
    seeds: int = Field(default=3, ge=1)
    """Reward models per condition, with seeds 0, 1, ... Fewer than 3 cannot tell a difference between conditions from
    luck."""
    seeds_differ_in: tuple[Literal["data", "training", "sampling"], ...] = ("data", "training", "sampling")
    """What a seed draws anew. data: the pairs, where `pairs` leaves a choice, and the labels that are flipped.
    training: the start of the head and the order of the pairs. sampling: the prompts, samples and adapter of PPO. What
    it leaves out is that of seed 0 in all of them, so intervals over seeds say nothing about it."""
    pairs: tuple[int, ...] = ()
    """Numbers of training pairs to compare (empty: all pairs)."""
    layers: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Sizes of the reward model to compare: the first n layers of its base (empty: rm.num_layers, or the variant's
    own)."""
    label_noise: tuple[Annotated[float, Field(ge=0, le=0.5)], ...] = (0.0,)
    """Shares of flipped training labels to compare, in place of the variants' own. 0 is clean labels."""
    ensembles: tuple[str, ...] = ("mean", "min")
    """Combiners of the seeds of a condition. They work on scores that exist, so no model is run for them."""
    sweep: tuple[str, ...] = (
        "mean", "min", "median", "quantile:0.25", "uwo:0.1", "uwo:0.5", "uwo:1", "uwo:2", "length:0.1", "length:0.3",
    )  # fmt: skip
    """Combiners that are compared at one n, from the same scores (`study/analysis/combiners.py` explains them)."""
    second_gold: Gold | None = None
    """Another gold that scores the pools after everything is trained, to see whether the verdicts depend on the gold
    (null: none)."""
    soft_temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    """Temperatures of soft best-of-n, in standard deviations of the proxy within prompts (empty: none)."""
    ppo_variants: tuple[str, ...] = ()
    """Variants whose reward models policies are trained against (empty: no policy is trained)."""
    ppo_label_noise: tuple[Annotated[float, Field(ge=0, le=0.5)], ...] = ()
    """Label noises of the reward models that policies are trained against (empty: all of label_noise)."""
    ppo_layers: tuple[int, ...] = ()
    """Sizes of the reward models that policies are trained against (empty: all of layers)."""
    ppo_seeds: int = Field(default=1, ge=1)
    """Policies are trained against the first n seeds of each of these conditions, and n against each ensemble."""
    ppo_ensembles: tuple[str, ...] = ()
    """Policies are also trained against ensembles: each of these rules combines all seeds of each of these conditions,
    as ppo.ensemble does: mean, min, median, uwo:WEIGHT, quantile:Q or soft_min:BETA (empty: no ensemble)."""
    ppo_ensemble_variants: tuple[str, ...] = ()
    """Variants whose seeds ppo_ensembles combines (empty: all of ppo_variants)."""
    kl_coefs: tuple[float, ...] = (0.02,)
    """Values of ppo.kl.coef. One policy is trained with each, against each of these reward models."""
    kl_sweep: tuple[float, ...] = ()
    """Further values of ppo.kl.coef, each for one policy more against the first seed of the first of these conditions
    (empty: none)."""
    policies_at_once: int = Field(default=1, ge=1)
    """Policies that are trained at the same time, each on its share of the GPUs, or without GPUs of the cores: at most
    as many as there are of these. engine.processes is then the processes of one of them."""

    @model_validator(mode="after")
    def _once(self) -> Study:
        axes = {name: value for name, value in self if isinstance(value, tuple) and len(set(value)) < len(value)}
        if axes:
            raise ValueError("; ".join(f"{name} {list(value)} has an entry twice" for name, value in axes.items()))
        return self


class Config(Section):
    run: Run = Run()
    """Where the results go, and the seed."""
    policy: Model = Model()
    """The language model that samples all responses and that PPO trains. Before PPO it is the reference."""
    data: Data = Data()
    """The prompts."""
    generation: Generation = Generation()
    """How responses are sampled."""
    gold: Gold = Gold()
    """The reward model that labels sampled pairs and measures every result. Nothing is optimised for it."""
    sft: Sft | None = None
    """Supervised fine-tuning of the policy before anything is sampled (null: none)."""
    preferences: Preferences = Preferences()
    """The labelled pairs that reward models are trained on."""
    rm: RewardTraining = RewardTraining()
    """Training of reward models."""
    bon: BestOfN = BestOfN()
    """Best-of-n."""
    ppo: Ppo = Ppo()
    """PPO, and other policy-gradient methods with the same loop."""
    engine: Engine = Engine()
    """Processes, memory and number type of training. sft.engine, rm.engine and ppo.engine say what differs for one
    stage."""
    eval: Evaluation = Evaluation()
    """Evaluation of PPO's policies, and the intervals of all curves."""
    study: Study = Study()
    """What the over-optimisation study compares."""

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    def after_sft(self) -> Config:
        """This configuration as the stages after `sft` see it: their policy is the fine-tuned one.

        It is read from the run's folder, and has the chat options of the policy that it was made of.
        """
        if self.sft is None:
            return self
        tuned = {"path": str(self.run_dir / "sft" / "policy"), "revision": None}
        return self.model_copy(update={"policy": self.policy.model_copy(update=tuned)})

    @property
    def one_reference(self) -> bool:
        """Whether the pools of best-of-n are sampled from the distribution that policies start from."""
        return self.bon.top_p == 1 and self.bon.temperature in (None, self.generation.temperature)

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
        buffer, most = self.ppo.reward.overlong_buffer, self.generation.max_new_tokens
        if buffer and buffer > most:
            faults.append(f"ppo.reward.overlong_buffer {buffer} exceeds generation.max_new_tokens {most}")
        label = self.ppo.reward.url_label
        if label and label not in self.data.metadata:
            faults.append(f"ppo.reward.url_label {label!r} is none of data.metadata {list(self.data.metadata)}")
        dtype = self.engine_of("ppo").dtype
        if self.ppo.sync == "adapter" and dtype != self.generation.vllm.dtype:
            faults.append(
                f"ppo.sync adapter rounds nothing where both sides have one type: engine.dtype is {dtype}, "
                f"generation.vllm.dtype {self.generation.vllm.dtype}"
            )
        settings = self.engine_of("ppo")
        if self.ppo.offload_while_sampling and settings.offload:
            faults.append(
                "ppo.offload_while_sampling and engine.offload exclude each other: the latter keeps optimiser states "
                "in host memory all the time"
            )
        elif self.ppo.offload_while_sampling and settings.zero_stage == 0:
            faults.append("ppo.offload_while_sampling: DeepSpeed moves nothing at engine.zero_stage 0: take 1, 2 or 3")
        if (self.policy.path, self.policy.revision) == (self.rm.base.path, self.rm.base.revision):
            faults += [
                f"policy.{name} and rm.base.{name} differ: policy and reward models would read other tokens; set both"
                for name in CHAT_OPTIONS
                if getattr(self.policy, name) != getattr(self.rm.base, name)
            ]
        for stage in ENGINE_STAGES:
            processes = self.engine_of(stage).processes
            if processes != "auto":
                faults += self.batch_faults(stage, processes)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def engine_of(self, stage: EngineStage) -> Engine:
        """The section `engine` as it is for one stage: with what `rm.engine`, say, lays over it."""
        section = getattr(self, stage)
        changes: EngineOfStage | None = section and section.engine
        return self.engine.changed(changes) if changes else self.engine

    def batch_faults(self, stage: EngineStage, world: int) -> list[str]:
        """What of a stage's batches does not divide on `world` ranks, one line each; empty when all is well."""
        section = getattr(self, stage)
        own = section and section.engine.processes is not None
        key = f"{stage}.engine.processes" if own else "engine.processes"
        ranks = f"{world} ranks ({key}, or torchrun's)"
        sft, rm, ppo = self.sft, self.rm, self.ppo
        rows = f"{ranks} x ppo.micro_batch {ppo.micro_batch} x ppo.minibatches {ppo.minibatches}"
        samples = f"{ranks} x ppo.samples_per_prompt {ppo.samples_per_prompt}"
        rules: dict[str, list[tuple[str, int, str, int]]] = {
            "sft": [
                ("sft.global_batch", sft.global_batch, f"{ranks} x sft.micro_batch {sft.micro_batch}", sft.micro_batch),
            ] if sft else [],
            "rm": [
                ("rm.global_batch", rm.global_batch, f"{ranks} x rm.micro_batch {rm.micro_batch}", rm.micro_batch),
            ],
            "ppo": [
                ("ppo.rollouts", ppo.rollouts, rows, ppo.micro_batch * ppo.minibatches),
                ("ppo.rollouts", ppo.rollouts, samples, ppo.samples_per_prompt),
            ],
        }  # fmt: skip
        return [
            f"{name} {value} is not divisible by {parts} = {world * per_rank}"
            for name, value, parts, per_rank in rules[stage]
            if value % (world * per_rank)
        ]
