"""The whole configuration of a run: one frozen tree, every field with its meaning.

YAML files are laid over each other and dotted overrides come last (`pipelines.load`). Values are
checked here, once; past `load()` a config is complete and consistent. Numbers that follow from
others (accumulation steps, rollouts per rank) are properties, not fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["bfloat16", "float16", "float32"]


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


class Run(Section):
    name: str = "offline"
    """Folder of the run below `dir`."""
    dir: Path = Path("runs")
    """Where runs are kept."""
    seed: int = Field(1, ge=0)
    """Every random draw of every stage derives from this number."""


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


class Splits(Section):
    """Shares of the prompts, cut by prompt hash: a prompt never changes its split when others come or go."""

    rm_train: Fraction = 0.45
    rm_val: Fraction = 0.12
    rl_train: Fraction = 0.25
    calibration: Fraction = 0.06
    eval: Fraction = 0.12

    @model_validator(mode="after")
    def _sums_to_one(self) -> Splits:
        total = sum(self.model_dump().values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares sum to {total:.4f}, not 1")
        return self


class Data(Section):
    prompts: Path = Path("data/prompts.jsonl")
    """JSON Lines: one object a line with `prompt` (a string) or `messages` (ending with a user turn)."""
    system: str | None = None
    """System message put before every prompt that has none."""
    max_prompt_tokens: int = Field(256, ge=8)
    """Longer prompts are dropped, counted and listed in `rejected.jsonl`."""
    splits: Splits = Splits()


class Vllm(Section):
    dtype: Dtype = "bfloat16"
    max_model_len: int = Field(512, ge=16)
    """Prompt plus response, in tokens."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences decoded together."""
    block_size: int | None = 32
    """KV-cache block in tokens (null: vLLM's choice). Prefixes are shared by whole blocks; CPU's own 128 is long."""
    enforce_eager: bool = True
    """False compiles and captures graphs: faster after a minute of warm-up. Right for long GPU runs."""
    gpu_memory_utilization: float = Field(0.4, gt=0, lt=1)
    """Share of GPU memory for weights and KV cache; in PPO the trainer needs the rest."""
    sleep: bool = True
    """In PPO on a GPU, free vLLM's memory while the trainer works. No effect on CPU."""
    cpu_kvcache_gib: int = Field(1, ge=1)
    """KV cache of one engine on CPU, GiB."""


class Generation(Section):
    temperature: float = Field(1.0, gt=0)
    """Of every sample in the study. Trainer log-probs are divided by it too, so KL is that of what is sampled."""
    max_new_tokens: int = Field(64, ge=1)
    vllm: Vllm = Vllm()


class Gold(Section):
    kind: Literal["judge", "hub", "checkpoint", "linear"] = "judge"
    """judge: the built-in scorer; hub or checkpoint: a trained reward model; linear: known E[gold | proxy], tests."""
    path: str = "models/all-MiniLM-L6-v2"
    """The sentence-embedding model of `judge`; the hub id or folder of the others."""
    batch_tokens: int = Field(16384, ge=64)

    @property
    def is_local(self) -> bool:
        return self.kind != "hub"


class PreferenceSource(Section):
    """A set of labelled pairs, local or on the hub."""

    path: Path
    """A .jsonl, .json or .parquet file, a folder of such, or a hub id."""
    layout: Literal["auto", "unified", "trl", "hh", "ratings"] = "auto"
    """auto: told from the columns. The layouts are described in `pipelines/sources.py`."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Of a hub dataset; in a folder, files whose names begin with it are read alone, where there are any."""
    revision: str | None = None
    """Hub revision; pin one for a run that others shall repeat."""
    stride: int = Field(1, ge=1)
    """Take every so manieth pair, ties not counted: 20 and 2 are the 40K and 400K of Unified-Feedback."""
    max_pairs: int | None = Field(None, ge=2)
    """At most so many, chosen by hash."""
    weight: float = Field(1.0, gt=0)
    """How often a training pair of this source is seen in an epoch; a fraction is the share of pairs seen."""


class Preferences(Section):
    sources: dict[str, PreferenceSource] = {}
    """Pairs of others in place of sampled ones; their labels then stand for gold in held-out accuracy."""
    max_rejected_share: Fraction = 0.01
    """Malformed rows of a source beyond this share are an error; all of them are listed in `rejected.jsonl`."""
    decontaminate: tuple[Path, ...] = ()
    """Evaluation sets (what `grm rm-eval --set` reads) whose prompts no pair may have."""
    label_noise: Fraction = Field(0.0, le=0.5)
    """Share of pairs whose label is flipped; flips are marked, so held-out accuracy is known against both."""
    shard_prompts: int = Field(256, ge=1)
    """Prompts sampled between two writes to disk: what a killed stage loses at most."""
    max_train_pairs: int | None = Field(None, ge=2)
    max_val_pairs: int | None = Field(None, ge=2)
    max_calibration_prompts: int | None = Field(None, ge=2)


class Optim(Section):
    lr: float = Field(1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Fraction = 0.03
    """Share of the steps over which lr rises from 0."""
    max_grad_norm: float = Field(1.0, gt=0)


class RewardVariant(Section):
    """One reward model: what differs between the arms of a comparison."""

    text_regulariser: Literal["none", "sft", "sft_plain", "dpo_noref", "dpo"] = "none"
    """none is Bradley-Terry; the others are GRM (arXiv 2406.10216). dpo needs log-probs of the untrained base, which
    are computed once before training."""
    alpha: Fraction = 0.01
    """Weight of the text regulariser: total = (1 - alpha) * reward loss + alpha * regulariser."""
    beta: float = Field(0.1, gt=0)
    regularise: Literal["last", "every_turn"] = "last"
    """The regulariser reads the response alone, or also the assistant's turns in the prompt."""
    head: Literal["linear", "mlp", "inform", "odin"] = "mlp"
    """inform: variational bottleneck (arXiv 2402.09345); odin: length apart from quality (arXiv 2402.07319)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    noise_rate: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong: the loss corrected for them (rDPO, arXiv 2403.00409)."""
    margin: float = Field(0.0, ge=0)
    """Times the gap of ratings (or gold) of a pair: what the reward difference has to exceed (arXiv 2307.09288)."""
    positive: float = Field(0.0, ge=0)
    """Weight of -log sigmoid(mean reward of chosen responses)."""
    center: float = Field(0.0, ge=0)
    """Weight of mean((r_chosen + r_rejected)^2), which pins the free offset of Bradley-Terry (arXiv 2312.09244)."""
    head_weight: float = Field(0.1, ge=0)
    """Weight of the head's own terms: InfoRM's KL in nats, ODIN's correlations and overlap (there 1 is usual)."""
    trainable_layers: int | None = Field(None, ge=0)
    """In place of rm.trainable_layers for this variant; 0 freezes the backbone."""
    pairs: int | None = Field(None, ge=2)
    """Train on the first so many pairs (null: all): data sizes of one study are nested."""
    label_noise: Fraction = Field(0.0, le=0.5)
    """Share of its training labels that are flipped, the same ones for every variant of as many pairs; beside those of
    preferences.label_noise."""
    seed: int = Field(0, ge=0)
    """Another head and another order of the pairs: the members of an ensemble differ in nothing else."""

    @model_validator(mode="after")
    def _one_correction(self) -> RewardVariant:
        if self.noise_rate and self.label_smoothing:
            raise ValueError("noise_rate and label_smoothing exclude each other: both correct for wrong labels")
        return self


class RewardTraining(Section):
    """Everything that the variants share."""

    base: Model = Model()
    num_layers: int | None = Field(None, ge=1)
    """Use the first so many layers of the backbone (null: all)."""
    trainable_layers: int | None = Field(None, ge=1)
    """Train the last so many layers and the head (null: everything)."""
    cache_frozen_layers: bool = False
    """With trainable_layers: run the layers below once per pair and keep their output (2 H bytes a token in memory)
    for the other variants and epochs."""
    lora: Lora | None = None
    epochs: int = Field(1, ge=1)
    global_batch: int = Field(32, ge=1)
    """Pairs per optimiser step, over all ranks."""
    micro_batch: int = Field(8, ge=1)
    """Pairs per forward pass on one rank, on average: passes hold equally many tokens, not pairs."""
    max_tokens: int = Field(512, ge=16)
    """Of a conversation."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Longer pairs are left out, or lose the beginning of their prompt; both are counted."""
    optim: Optim = Optim(lr=5e-5)
    variants: dict[str, RewardVariant] = {"grm": RewardVariant(text_regulariser="sft"), "bt": RewardVariant()}

    @model_validator(mode="after")
    def _consistent(self) -> RewardTraining:
        if not self.variants:
            raise ValueError("rm.variants is empty: name at least one reward model")
        if self.lora and self.trainable_layers:
            raise ValueError("lora and trainable_layers exclude each other (lora.top_layers limits the adapters)")
        if self.cache_frozen_layers and not self.trainable_layers:
            raise ValueError("cache_frozen_layers needs trainable_layers: otherwise no layer is frozen")
        return self


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


class Kl(Section):
    coef: float = Field(0.05, ge=0)
    """beta in reward = proxy - beta * sum_t log(pi / pi_0)."""
    target: float | None = Field(None, gt=0)
    """Nats per response; when set, the coefficient follows Ziegler et al. (1909.08593) with `horizon`."""
    horizon: int = Field(10_000, ge=1)
    where: Literal["reward", "loss"] = "reward"
    """reward: the k1 estimate is taken from each token's reward, and the optimum is pi_0 exp(r / beta); loss: a term of
    the loss with the gradient of k2, as in GRPO. There a token does not answer for the KL of those after it, so the
    optimum is another one."""
    stop: float | None = Field(None, gt=0)
    """Leave the epochs over a rollout early, once a minibatch finds the policy this far from the one that sampled it:
    nats a token (k3)."""


class Clip(Section):
    low: float = Field(0.2, gt=0, lt=1)
    high: float = Field(0.2, gt=0)
    value: float | None = Field(0.2, gt=0)
    """Of the critic, in units of the reward (null: no clipping)."""
    dual: float | None = Field(None, gt=1)
    importance_weight: float | None = Field(2.0, gt=0)
    """Cap of the truncated importance weight pi_trainer / pi_vllm (null: no correction)."""


class Reward(Section):
    """From the raw reward of a response to the one that PPO optimises, in this order."""

    normalise: Literal["calibration", "running", "none"] = "calibration"
    """calibration: mean and standard deviation of pi_0's samples on the calibration prompts, fixed; running: those of
    all rollouts so far; none: the reward model's own units."""
    shape: Literal["none", "par", "log_sigmoid"] = "none"
    """par: sigmoid(r - center) (arXiv 2502.18770); log_sigmoid: log sigmoid(r - center) (arXiv 2402.00742). Both gain
    little where the proxy is far above what it was calibrated on."""
    center: float = 0.0
    """Of the shapes, in normalised units; 0 is the mean of pi_0's samples, 1.04 their 85th percentile if normal."""
    clip: float | None = Field(10.0, gt=0)
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken from the reward of a response cut off by max_new_tokens."""
    length_penalty: float = Field(0.0, ge=0)
    """Taken from the reward for each token of the response."""


class Ensemble(Section):
    members: tuple[str, ...] = Field(min_length=2)
    """Names of rm.variants; ppo.proxy, which the critic starts from, is one of them."""
    combine: str = "mean"
    """Of the members' standardised rewards: mean, min (WCO), median, uwo:WEIGHT, quantile:Q or soft_min:BETA."""


class Ppo(Section):
    proxy: str = "grm"
    """Which of rm.variants is optimised."""
    ensemble: Ensemble | None = None
    """Optimise a combination of several reward models instead (arXiv 2310.02743)."""
    seed: int = Field(0, ge=0)
    """Another order of prompts, other samples and another adapter: repetitions of a run differ in nothing else."""
    estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    """Of advantages. gae is PPO with a critic; the others have none: rloo (arXiv 2402.14740) and grpo (2402.03300)
    compare the samples of a prompt, reinforce++ (2501.03262) whitens rewards to go."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt of a step; rollouts / samples_per_prompt prompts are drawn."""
    whiten_advantages: bool = True
    """To mean 0 and variance 1 over all tokens of a rollout, on all ranks; not done with rloo and grpo."""
    reward: Reward = Reward()
    reward_server: str | None = None
    """http://host:port of a `grm rm-serve` of that model (null: it is held by the ranks). The critic starts from the
    local folder all the same."""
    lora: Lora | None = Lora()
    """null: the policy is trained in full and the reference is a second engine."""
    steps: int = Field(12, ge=1)
    rollouts: int = Field(64, ge=1)
    """Responses per step, over all ranks."""
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(2, ge=1)
    """Optimiser steps per epoch."""
    micro_batch: int = Field(8, ge=1)
    """Sequences per forward pass on one rank."""
    kl: Kl = Kl()
    clip: Clip = Clip()
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    """Of GAE. 1 takes no bias from the critic, for more variance: right for short runs, whose critic has little time to
    learn; at 0.95 with critic_head = reward responses of the 135M model stopped ending (docs/ppo.md)."""
    entropy_coef: float = Field(0.0, ge=0)
    critic_warmup_steps: int = Field(0, ge=0)
    """Steps at the start in which only the critic learns."""
    actor: Optim = Optim(lr=2e-4, eps=1e-5, schedule="constant")
    critic: Optim = Optim(lr=5e-5, eps=1e-5, schedule="constant")
    critic_trainable_layers: int | None = Field(None, ge=1)
    """Train the last so many layers of the critic and its head (null: everything)."""
    critic_init: Literal["proxy", "policy"] = "proxy"
    """Whose layers the critic starts with."""
    critic_head: Literal["zero", "reward"] = "zero"
    """Its head starts at 0, or as the reward head, whose output in a response
    is not a value yet: with lam below 1 that bias drives the policy until the critic has learned (arXiv 2503.01491)."""
    reuse_frozen_layers: bool = True
    """Run the lowest layers that actor, reference and critic have in common, all frozen, once per rollout."""
    checkpoint_every: int = Field(4, ge=1)
    """Steps between policies kept for evaluation; the last step always is one."""
    keep_policies: int | None = Field(None, ge=1)
    """Of those, keep the last so many and the best by reward less KL penalty on its own rollout (null: all)."""
    save_every: int = Field(4, ge=1)
    """Steps between resumable states (weights, optimisers, KL coefficient, reward statistics)."""
    vllm_servers: tuple[str, ...] = ()
    """http://host:port of servers started with `grm vllm-serve`, in place of an engine in each rank. They read new
    weights from the run directory. Their samples are not seeded, so such a run does not repeat bit for bit."""
    server_timeout: float = Field(600.0, gt=0)
    """Seconds that a server has to sample a rank's responses, or to take new weights."""
    trackers: tuple[str, ...] = ()
    """Beside TensorBoard and metrics.jsonl: any tracker of accelerate that is installed, for example wandb."""

    @property
    def members(self) -> tuple[str, ...]:
        """The reward models that make the reward."""
        return self.ensemble.members if self.ensemble else (self.proxy,)

    @property
    def label(self) -> str:
        """Of what is optimised, in tables and figures."""
        return f"{self.combine} of {', '.join(self.members)}" if self.ensemble else self.proxy

    @property
    def combine(self) -> str | None:
        """How; None for a single one."""
        return self.ensemble.combine if self.ensemble else None

    @property
    def prompts_per_step(self) -> int:
        return self.rollouts // self.samples_per_prompt

    @model_validator(mode="after")
    def _divides(self) -> Ppo:
        exact_div(self.rollouts, self.samples_per_prompt, "ppo.rollouts by ppo.samples_per_prompt")
        if self.estimator in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise ValueError(
                f"estimator {self.estimator} compares samples of a prompt: set samples_per_prompt to 2 or more"
            )
        if self.proxy not in self.members:
            raise ValueError(f"proxy {self.proxy!r}, which the critic starts from, is none of ensemble.members")
        if self.critic_init == "policy" and self.critic_head == "reward":
            raise ValueError("critic_init policy has no reward head: set critic_head to zero")
        if self.ensemble and self.reward_server:
            raise ValueError("ensemble and reward_server exclude each other: the server answers for one model")
        if self.estimator != "gae" and self.critic_warmup_steps:
            raise ValueError(f"estimator {self.estimator} has no critic to warm up: set critic_warmup_steps to 0")
        if self.lora and self.lora.dropout:
            raise ValueError(f"lora.dropout {self.lora.dropout} would make the PPO ratio differ from 1: set it to 0")
        if self.critic_warmup_steps >= self.steps:
            raise ValueError(f"critic_warmup_steps {self.critic_warmup_steps} leaves no step of {self.steps} to PPO")
        return self


class Engine(Section):
    """DeepSpeed: how training is spread over processes."""

    processes: int | Literal["auto"] = "auto"
    """Ranks on this machine. auto: one per GPU, or two on CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """bfloat16 keeps float32 master weights in the optimiser."""
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
    """The matrix of `grm study`: each method with each data size, label noise and seed."""

    methods: tuple[str, ...] = ()
    """Names of rm.variants (empty: all of them)."""
    seeds: int = Field(3, ge=1)
    """Heads and orders of the pairs; 3 is the least that says something of a method."""
    pairs: tuple[int, ...] = ()
    """Training pairs (empty: all)."""
    label_noise: tuple[Annotated[float, Field(ge=0, le=0.5)], ...] = (0.0,)
    ensembles: tuple[str, ...] = ("mean", "min")
    """Combiners of the seeds of a condition, from their scores: no model is run for them."""
    soft_temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    """Of soft best-of-n, in standard deviations of the proxy within prompts (empty: none)."""
    ppo_methods: tuple[str, ...] = ()
    """Methods that policies are trained against (empty: none)."""
    ppo_label_noise: tuple[Annotated[float, Field(ge=0, le=0.5)], ...] = ()
    """Label noises of the reward models that policies are trained against (empty: all of label_noise)."""
    ppo_seeds: int = Field(1, ge=1)
    """Of the seeds of these methods, the first so many."""
    kl_coefs: tuple[float, ...] = (0.02,)


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
