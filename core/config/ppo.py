"""Configuration of PPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config.base import Lora, Optim, Section, exact_div
from core.config.engine import EngineOfStage
from core.config.reward import Reward


class Kl(Section):
    coef: float = Field(default=0.05, ge=0)
    """beta in reward = proxy - beta * sum_t log(pi / pi_0), in units of the normalised reward per nat. Raise it when KL
    grows too fast. 0 is no penalty."""
    target: float | None = Field(default=None, gt=0)
    """KL that the coefficient steers towards, in nats per response, as in Ziegler et al. (arXiv 1909.08593). null: coef
    stays as it is."""
    horizon: int = Field(default=10_000, ge=1)
    """With target: how slowly the coefficient adapts, in responses. A step of n responses multiplies it by
    1 + e * n / horizon, where e is KL / target - 1, but at least -0.2 and at most 0.2."""
    where: Literal["reward", "loss"] = "reward"
    """reward: subtract the k1 estimate of the KL from each token's reward. The optimum is then pi_0 exp(r / beta).
    loss: add a term to the loss with the gradient of k2, as in GRPO. There a token does not answer for the KL of later
    ones, so the optimum is another one."""
    stop: float | None = Field(default=None, gt=0)
    """Stop updating the policy on a rollout once a minibatch shows it this far from the policy that sampled: nats per
    token (k3). null: never. 0.02 is a usual limit."""


ImportanceLevel = Literal["token", "sequence", "geometric"]
"""Whose ratio pi_trainer / pi_vllm a token has: its own, or that of its response, as a product or a geometric mean."""


class ImportanceMask(Section):
    level: ImportanceLevel = "token"
    """Whose ratio is looked at, as in clip.importance_level: that of each token, or of the response, all of whose
    tokens then get weight 0."""
    low: float = Field(default=0.5, ge=0)
    """Weight 0 where the ratio is lower than this. 0: no such bound."""
    high: float = Field(default=5.0, gt=0)
    """Weight 0 where the ratio is higher. The range [0.5, 5] is that of IcePop, for tokens. Products over long
    responses need a wider one, geometric means one that is much nearer to 1."""

    @model_validator(mode="after")
    def _range(self) -> ImportanceMask:
        if self.low >= self.high:
            raise ValueError(f"importance_mask accepts no ratio: low {self.low:g} is not below high {self.high:g}")
        return self


class Clip(Section):
    low: float = Field(default=0.2, gt=0, lt=1)
    """A token's probability ratio pi_new / pi_old is clipped from below at 1 - low."""
    high: float = Field(default=0.2, gt=0)
    """The ratio is clipped from above at 1 + high. Above `low`, unlikely tokens may gain more (arXiv 2503.14476)."""
    value: float | None = Field(default=0.2, gt=0)
    """The critic's values are clipped to this distance from those of the rollout, in units of the normalised reward
    (null: no clipping)."""
    dual: float | None = Field(default=None, gt=1)
    """Where the advantage A is negative, a token's objective does not fall below dual * A, however large its ratio
    (arXiv 1912.09729, which uses 3). null: no such bound."""
    importance_weight: float | None = Field(default=2.0, gt=0)
    """Cap of the importance weight pi_trainer / pi_vllm, which corrects for vLLM's arithmetic (null: no weights)."""
    importance_level: ImportanceLevel = "token"
    """Whose ratio the weight of a token is: its own, that of its response (the product over its tokens: unbiased, of a
    variance that grows with length), or the geometric mean over the response."""
    importance_mask: ImportanceMask | None = None
    """Besides, weight 0 where the ratio is outside a range: IcePop (arXiv 2510.18855), with importance_weight no lower
    than the upper end of the range. With importance_weight null the other weights are 1 (null: no mask)."""


class Ensemble(Section):
    members: tuple[str, ...] = Field(min_length=2)
    """Names of rm.variants. One of them is ppo.proxy, which the critic starts from."""
    combine: str = "mean"
    """How the members' standardised rewards are combined: mean, min (WCO), median, uwo:WEIGHT, quantile:Q or
    soft_min:BETA."""


class Ppo(Section):
    proxy: str = "grm"
    """Which of rm.variants is optimised."""
    ensemble: Ensemble | None = None
    """Optimise a combination of several reward models instead (arXiv 2310.02743). null: proxy alone."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives another order of prompts, other samples and another start of the adapter. Repetitions of a run
    differ in nothing else."""
    estimator: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce++"] = "gae"
    """How advantages are estimated. gae is PPO with a critic, the others have none: rloo (arXiv 2402.14740), grpo
    (arXiv 2402.03300) and dr_grpo (arXiv 2503.20783, without grpo's division by the standard deviation) compare the
    samples of a prompt, reinforce++ (arXiv 2501.03262) whitens rewards to go."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt of a step, which draws rollouts / samples_per_prompt prompts. rloo, grpo and dr_grpo
    need 2 or more."""
    dynamic_sampling: int | None = Field(default=None, ge=2)
    """DAPO (arXiv 2503.14476): prompts whose samples all have one reward teach rloo, grpo and dr_grpo nothing, and
    others are sampled in their place, in at most n rounds a step, the first one included (null: they stay)."""
    whiten_advantages: bool = True
    """Bring advantages to mean 0 and variance 1 over all tokens of a rollout, on all ranks. Estimators that compare
    the samples of a prompt never do."""
    objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    """The policy loss. ppo: a token's ratio is clipped. gspo (arXiv 2507.18071): that of the response to the power 1 /
    its length; set clip.low and clip.high to 3e-4 and 4e-4, and loss_aggregation to sequence-mean-token-mean. cispo
    (arXiv 2506.13585): the ratio is a clipped weight of log pi, so no token loses its gradient."""
    loss_aggregation: Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm"] = "token-mean"
    """How the policy loss weighs tokens, its KL and entropy terms too. token-mean: all alike.
    sequence-mean-token-mean: each response alike, as GRPO. sequence-mean-token-sum-norm: each token by 1 /
    generation.max_new_tokens, and the mean over responses, as Dr. GRPO."""
    reward: Reward = Reward()
    """How the proxy's rewards are scaled, shaped and penalised before PPO optimises them."""
    reward_server: str | None = None
    """http://host:port of `grm rm-serve` with the proxy, which then answers for its rewards (null: the ranks hold the
    proxy). The critic starts from the local folder all the same."""
    lora: Lora | None = Lora()
    """Adapters of the policy (null: all its weights are trained, and the reference is a second model in memory)."""
    steps: int = Field(default=12, ge=1)
    """PPO steps. Each samples one rollout and trains on it."""
    rollouts: int = Field(default=64, ge=1)
    """Responses per step, over all ranks. A multiple of engine.processes * micro_batch * minibatches."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each rollout. More passes learn more from it, from samples of a policy that is further away."""
    minibatches: int = Field(default=2, ge=1)
    """Optimiser steps per epoch, each on a random share of the rollout."""
    micro_batch: int = Field(default=8, ge=1)
    """Sequences per forward pass on one rank, on average: passes hold equally many tokens, not sequences. Lower it when
    memory runs out."""
    kl: Kl = Kl()
    """The penalty on the distance from the reference."""
    clip: Clip = Clip()
    """Limits of the policy's ratio, of the critic's values and of importance weights."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token of later rewards. 1 discounts nothing and is usual, since the proxy rewards the last token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """lambda of GAE. 1 takes no bias from the critic, for more variance: right for short runs, whose critic has little
    time to learn. At 0.95 with critic_head=reward, responses of the 135M model stopped ending (docs/ppo.md)."""
    lam_alpha: float | None = Field(default=None, gt=0)
    """In place of lam, 1 - 1 / (lam_alpha * length) for the advantages of each response, and 0 where that is negative:
    VAPO (arXiv 2504.05118), which has 0.05. null: lam."""
    critic_lam: float | None = Field(default=None, ge=0, le=1)
    """lambda of the returns that the critic learns: VC-PPO and VAPO have 1, the rewards themselves, beside a lower one
    for the policy (arXiv 2503.01491). null: the policy's."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of an entropy bonus in the policy loss, in nats per token. 0 is none and saves its computation."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start in which only the critic learns."""
    actor: Optim = Optim(lr=2e-4, eps=1e-5, schedule="constant")
    """Optimiser of the policy. Its schedule begins after the critic's warm-up steps."""
    critic: Optim = Optim(lr=5e-5, eps=1e-5, schedule="constant")
    """Optimiser of the critic, with estimator gae."""
    critic_trainable_layers: int | None = Field(default=None, ge=1)
    """Train only the last n layers of the critic and its head (null: everything)."""
    critic_lora: Lora | None = None
    """Adapters of the critic, which are trained with its head in place of its own layers (null: critic_trainable_layers
    says what is trained). Their learning rate is critic.lr: adapters need a larger one than whole weights. Below ZeRO
    stage 3 its frozen weights are in memory once with those of the policy or of the proxy that they equal."""
    critic_init: Literal["proxy", "policy"] = "proxy"
    """Whose layers the critic starts with."""
    critic_head: Literal["zero", "reward"] = "zero"
    """zero: the critic's head starts at 0. reward: it starts as the proxy's head. Within a response that is not a value
    yet, and with lam below 1 its bias drives the policy until the critic has learned (arXiv 2503.01491)."""
    reuse_frozen_layers: bool = True
    """Run the lowest layers of the policy once per rollout for all models that keep them frozen and equal: actor,
    reference, critic and proxy, each up to where its own frozen layers end."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of a moving average of the trained weights, which is saved as a policy in `policy-ema/` (null: no
    average)."""
    checkpoint_every: int = Field(default=4, ge=1)
    """Steps between policies that are kept for evaluation. The last step is always one of them."""
    checkpoint_kl: float | None = Field(default=None, gt=0)
    """Besides those, keep a policy whose KL from the reference, measured on the rollout that it sampled, is this many
    nats from that of the last one that was kept (null: none). So a policy that moves fast is evaluated as densely as
    one that moves slowly. With overlap it is a policy some steps after the one that was measured."""
    keep_policies: int | None = Field(default=None, ge=1)
    """Keep only the last n of these policies, and the best by reward less KL penalty on its own rollout (null: all).
    With an overlap above 1, a policy may have no rollout of its own."""
    save_every: int = Field(default=4, ge=1, json_schema_extra={"decides_result": False})
    """Steps between states to resume from (weights, optimisers, KL coefficient, reward statistics)."""
    keep_state: bool = Field(default=True, json_schema_extra={"decides_result": False})
    """Keep the last state of a finished run, so that a larger `ppo.steps` continues it. It holds weights and optimiser
    states: twelve to sixteen bytes for each trained parameter of actor and critic."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on held-out prompts, of the split rm_val, on which nothing is trained: proxy, KL,
    length and ends, in `held_out.jsonl` and TensorBoard (null: none). The first one is of the reference."""
    eval_prompts: int = Field(default=64, ge=2)
    """With eval_every: use the first n of these prompts, one response each."""
    watch_gold: bool = False
    """With eval_every: measure gold too. It is not used for training, and all that shows it says so. Who chooses
    settings by it has optimised gold all the same."""
    keep_rollouts_mib: float = Field(default=256.0, ge=0, json_schema_extra={"decides_result": False})
    """Keep all responses of the last steps in `rollouts/`, with tokens, log-probs, rewards and advantages, as many as
    fit into n MiB; `grm samples` shows them (0: keep none)."""
    vllm_servers: tuple[str, ...] = ()
    """http://host:port of servers started with `grm vllm-serve` (empty: each rank has an engine of its own). Their
    samples are not seeded, so such a run does not repeat bit for bit."""
    weight_transfer: Literal["file", "nccl"] = "file"
    """How the servers get new weights: from a file in the run directory, or from GPU to GPU."""
    overlap: bool | Annotated[int, Field(ge=0)] = False
    """Let the servers sample the responses of later steps while this one trains, at most so many steps ahead (true: 1).
    They are then at most so many steps off-policy, which clip.importance_weight or importance_mask corrects for. More
    than 1 saves time with partial_rollouts only."""
    partial_rollouts: bool = False
    """With overlap: new weights do not wait for responses that are being sampled. These go on under them, and each
    token keeps the log-prob of the policy that sampled it. A response is as old as its first token."""
    sync: Literal["weights", "adapter"] = "weights"
    """What vLLM gets after each step. weights: all weights, with adapters merged. adapter: the adapter alone, which
    rounds nothing away and moves little data, but slows sampling down (on CPU by a factor of three)."""
    server_timeout: float = Field(default=600.0, gt=0, json_schema_extra={"decides_result": False})
    """Seconds that a server has to sample a rank's responses, or to take new weights."""
    server_retries: int = Field(default=0, ge=0, json_schema_extra={"decides_result": False})
    """How often a request that a server did not answer, because it died or hangs, is sent to another of vllm_servers.
    The server is then left out for the rest of the run. 0: the run stops and names it. Needs weight_transfer file."""
    offload_while_sampling: bool = Field(default=False, json_schema_extra={"decides_result": False})
    """On a GPU, keep the optimiser states of actor and critic (12 bytes a trained parameter, divided by the ranks) in
    host memory but for the updates: room for a larger vLLM, for two copies a step. Not at engine.zero_stage 0."""
    engine: EngineOfStage = EngineOfStage()
    """Processes, memory and number type of this stage, where they differ from `engine`."""
    trackers: tuple[str, ...] = Field(default=(), json_schema_extra={"decides_result": False})
    """Trackers of accelerate that also get the metrics, for example wandb, which must be installed. TensorBoard and
    metrics.jsonl are always written."""

    @property
    def members(self) -> tuple[str, ...]:
        """The reward models that make the reward."""
        return self.ensemble.members if self.ensemble else (self.proxy,)

    @property
    def held_members(self) -> tuple[str, ...]:
        """Those of them that the ranks hold for scoring."""
        return () if self.reward_server or not self.reward.model_weight else self.members

    @property
    def label(self) -> str:
        """Of what is optimised, in tables and figures."""
        return f"{self.combine} of {', '.join(self.members)}" if self.ensemble else self.proxy

    @property
    def combine(self) -> str | None:
        """How; None for a single one."""
        return self.ensemble.combine if self.ensemble else None

    @property
    def ahead(self) -> int:
        """By how many steps rollouts may be off-policy."""
        return int(self.overlap)

    @property
    def compares(self) -> bool:
        """Whether advantages compare the samples of a prompt."""
        return self.estimator in ("rloo", "grpo", "dr_grpo")

    @property
    def prompts_per_step(self) -> int:
        return self.rollouts // self.samples_per_prompt

    @model_validator(mode="after")
    def _divides(self) -> Ppo:
        exact_div(self.rollouts, self.samples_per_prompt, "ppo.rollouts by ppo.samples_per_prompt")
        if self.compares and self.samples_per_prompt < 2:
            raise ValueError(
                f"estimator {self.estimator} compares samples of a prompt: set samples_per_prompt to 2 or more"
            )
        if self.dynamic_sampling and not self.compares:
            raise ValueError(f"dynamic_sampling is for rloo, grpo and dr_grpo, not for estimator {self.estimator}")
        if self.dynamic_sampling and self.overlap:
            raise ValueError("dynamic_sampling and overlap exclude each other: it samples until rewards are known")
        if self.objective == "gspo" and self.loss_aggregation != "sequence-mean-token-mean":
            raise ValueError("objective gspo averages over responses: set loss_aggregation to sequence-mean-token-mean")
        if self.objective == "cispo" and self.clip.dual:
            raise ValueError("objective cispo has no dual clip: set clip.dual to null")
        if self.estimator != "gae" and (self.critic_lam is not None or self.lam_alpha):
            raise ValueError(f"estimator {self.estimator} has no lambda: set critic_lam and lam_alpha to null")
        if self.proxy not in self.members:
            raise ValueError(f"proxy {self.proxy!r}, which the critic starts from, is none of ensemble.members")
        if self.critic_init == "policy" and self.critic_head == "reward":
            raise ValueError("critic_init policy has no reward head: set critic_head to zero")
        if self.reward.is_own and self.critic_head == "reward":
            raise ValueError("critic_head reward gives values of the proxy alone, not of a sum with own rewards")
        if not self.reward.model_weight and self.reward_server:
            raise ValueError("reward_server has nothing to score with reward.model_weight 0: set it to null")
        if self.ensemble and self.reward_server:
            raise ValueError("ensemble and reward_server exclude each other: the server answers for one model")
        if self.estimator != "gae" and self.critic_warmup_steps:
            raise ValueError(f"estimator {self.estimator} has no critic to warm up: set critic_warmup_steps to 0")
        if self.lora and self.lora.dropout:
            raise ValueError(f"lora.dropout {self.lora.dropout} would make the PPO ratio differ from 1: set it to 0")
        if self.critic_lora and self.critic_trainable_layers:
            raise ValueError("critic_lora and critic_trainable_layers exclude each other: set one of them to null")
        if self.critic_lora and self.critic_lora.dropout:
            raise ValueError(f"critic_lora.dropout {self.critic_lora.dropout} would make values random: set it to 0")
        if self.sync == "adapter" and (self.lora is None or self.vllm_servers or self.lora.rank > 512):
            raise ValueError("sync adapter needs lora of rank 512 at most, and no vllm_servers")
        if any("@" in server for server in self.vllm_servers):
            raise ValueError(
                "vllm_servers hold a user or a password, which manifests and reports would show: remove it"
            )
        if self.weight_transfer == "nccl" and not self.vllm_servers:
            raise ValueError("weight_transfer nccl is for vllm_servers; an engine in each rank needs no transfer")
        if self.server_retries and (self.weight_transfer == "nccl" or len(self.vllm_servers) < 2):
            raise ValueError("server_retries needs two vllm_servers or more, and weight_transfer file")
        if self.overlap and not (self.vllm_servers and (self.clip.importance_weight or self.clip.importance_mask)):
            raise ValueError(
                "overlap needs vllm_servers, which sample beside the trainer, and clip.importance_weight or "
                "clip.importance_mask, since the samples are those of an earlier policy"
            )
        if self.partial_rollouts and not self.overlap:
            raise ValueError("partial_rollouts are of responses that are sampled during training: set overlap too")
        if self.partial_rollouts and self.keep_policies:
            raise ValueError("keep_policies needs rollouts of one policy each, which partial_rollouts are not")
        if self.watch_gold and not self.eval_every:
            raise ValueError("watch_gold measures gold at the evaluations of eval_every: set it too")
        if self.critic_warmup_steps >= self.steps:
            raise ValueError(f"critic_warmup_steps {self.critic_warmup_steps} leaves no step of {self.steps} to PPO")
        return self
