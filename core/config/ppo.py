"""Configuration of PPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.config.base import Lora, Optim, Section, exact_div


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
    """Sequences per forward pass on one rank, on average: passes hold equally many tokens, not sequences."""
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
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay, a step, of a moving average of the trained weights, which is left as a policy in `policy-ema/`."""
    checkpoint_every: int = Field(4, ge=1)
    """Steps between policies kept for evaluation; the last step always is one."""
    keep_policies: int | None = Field(None, ge=1)
    """Of those, keep the last so many and the best by reward less KL penalty on its own rollout (null: all)."""
    save_every: int = Field(4, ge=1, json_schema_extra={"decides_result": False})
    """Steps between resumable states (weights, optimisers, KL coefficient, reward statistics)."""
    keep_state: bool = Field(default=True, json_schema_extra={"decides_result": False})
    """Keep the last resumable state of a finished run, so that a larger `ppo.steps` continues it. It holds weights and
    optimiser states: twelve to sixteen bytes for each trained parameter of actor and critic."""
    vllm_servers: tuple[str, ...] = ()
    """http://host:port of servers started with `grm vllm-serve`, in place of an engine in each rank. Their samples are
    not seeded, so such a run does not repeat bit for bit."""
    weight_transfer: Literal["file", "nccl"] = "file"
    """How the servers get new weights: from a file in the run directory, or from GPU to GPU."""
    overlap: bool = False
    """Let the servers sample the next step's responses while this one trains: one step off-policy, which
    clip.importance_weight corrects for."""
    sync: Literal["weights", "adapter"] = "weights"
    """What vLLM gets after each step: whole weights, adapters merged; or the adapter as it is, which rounds nothing
    away and moves little, but makes sampling slower (on CPU three times)."""
    server_timeout: float = Field(600.0, gt=0, json_schema_extra={"decides_result": False})
    """Seconds that a server has to sample a rank's responses, or to take new weights."""
    trackers: tuple[str, ...] = Field(default=(), json_schema_extra={"decides_result": False})
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
        if self.sync == "adapter" and (self.lora is None or self.vllm_servers or self.lora.rank > 512):
            raise ValueError("sync adapter needs lora of rank 512 at most, and no vllm_servers")
        if self.weight_transfer == "nccl" and not self.vllm_servers:
            raise ValueError("weight_transfer nccl is for vllm_servers; an engine in each rank needs no transfer")
        if self.overlap and not (self.vllm_servers and self.clip.importance_weight):
            raise ValueError(
                "overlap needs vllm_servers, which sample beside the trainer, and clip.importance_weight, since the "
                "samples are those of the policy before the last update"
            )
        if self.critic_warmup_steps >= self.steps:
            raise ValueError(f"critic_warmup_steps {self.critic_warmup_steps} leaves no step of {self.steps} to PPO")
        return self
