"""The models of a PPO run, each under an engine of its own: actor, critic, reference, proxy, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from core import config
from core.config import Model, Ppo, exact_div
from core.data.chat import ChatTokenizer
from core.data.streams import stream_seed
from core.errors import DataError
from core.models import CausalLM
from core.models.layers import FrozenLayers, frozen_layers_of, shared_depth, train_top_layers
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.training import distributed
from core.training.engine import Engine
from ppo.policy import PolicyModule
from ppo.proxy import LocalProxy, RemoteProxy
from rm.ensemble import AdapterEnsemble, one_base
from rm.model import RewardModel


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines of one PPO run."""

    actor: Engine
    critic: Engine | None
    """None for estimators that have none."""
    reference: Engine
    """With adapters it is the actor, run without them."""
    proxy: LocalProxy | RemoteProxy
    frozen_layers: Engine | None
    """The lowest layers, frozen and equal in actor, reference and critic: run once for all three, and for the reward
    models of the proxy that have them too. None for none."""


def make_engines(
    ppo: Ppo, policy: Model, settings: config.Engine, *,
    temperature: float, reward_models: Path, tokenizer: ChatTokenizer, seed: int,
) -> Engines:  # fmt: skip
    """Load the models and put them under engines. Every rank must call it.

    Args:
        temperature: of sampling; the policy's log-probs are taken at it.
        reward_models: folder of stage `rm`, with one folder per variant.
        tokenizer: the policy's.
        seed: of the adapter's initial weights.

    Raises:
        DataError: a reward model has another tokenizer than the policy.
        ArtefactError: a model cannot be loaded.
    """
    micro = ppo.micro_batch
    updates = ppo.epochs * ppo.minibatches
    rows = distributed.world_size() * micro * ppo.minibatches
    accumulation = exact_div(ppo.rollouts, rows, "ppo.rollouts by ranks x ppo.micro_batch x ppo.minibatches")
    trained = {"micro_batch": micro, "accumulation": accumulation}
    torch.manual_seed(stream_seed(seed, "ppo", "adapter"))
    lm = load_causal_lm(policy, dtype=settings.dtype, float32_head=settings.float32_head)
    if ppo.lora:
        lm = add_lora(lm, ppo.lora)
    loader = _RewardModels(reward_models, policy, settings, tokenizer)
    value_model = _critic(ppo, policy, settings, loader) if ppo.estimator == "gae" else None
    members, base_of_members = loader.members(ppo)
    # This compares weights, so it comes before they are sharded.
    lms = [lm, value_model.lm] if value_model else [lm]
    layers, continuing = _frozen_layers(ppo, policy, settings, lms, members)
    steps = ppo.steps - ppo.critic_warmup_steps
    actor = Engine(PolicyModule(lm, temperature), settings, optim=ppo.actor, total_steps=steps * updates, **trained)
    critic = None
    if value_model:
        critic = Engine(value_model, settings, optim=ppo.critic, total_steps=ppo.steps * updates, **trained)
    alike = len(members) + (ppo.lora is None) + (layers is not None)

    def frozen(module: nn.Module) -> Engine:
        return Engine(module, settings, micro_batch=micro, alike=alike)

    reference = actor
    if not ppo.lora:
        base = load_causal_lm(policy, dtype=settings.dtype, float32_head=settings.float32_head)
        reference = frozen(PolicyModule(base, temperature))
    if ppo.reward_server:
        proxy: LocalProxy | RemoteProxy = RemoteProxy(ppo.reward_server, loader.load(ppo.proxy))
    else:
        of_members = base_of_members.through(frozen(base_of_members)) if base_of_members else map(frozen, members)
        proxy = LocalProxy(list(of_members), ppo.combine, continuing)
    return Engines(actor, critic, reference, proxy, frozen(layers) if layers else None)


@dataclass(frozen=True, slots=True)
class _RewardModels:
    """Loads the reward models of stage `rm`; refuses one with another tokenizer than the policy."""

    folder: Path
    policy: Model
    settings: config.Engine
    tokenizer: ChatTokenizer

    def load(self, name: str) -> RewardModel:
        """In host memory: an engine puts it, or this rank's shard of it, on the GPU."""
        path = self.folder / name
        model = RewardModel.from_pretrained(
            path, dtype=self.settings.dtype, attention=self.policy.attention, where="cpu"
        )
        self._check(path, model)
        return model

    def members(self, ppo: Ppo) -> tuple[list[RewardModel], AdapterEnsemble | None]:
        """The reward models that the ranks hold as the proxy, and what holds them where they are adapters of one
        base."""
        if ppo.reward_server:
            return [], None
        paths = [self.folder / name for name in ppo.members]
        if not one_base(paths):
            return [self.load(name) for name in ppo.members], None
        ensemble = AdapterEnsemble.from_pretrained(
            paths, dtype=self.settings.dtype, attention=self.policy.attention, where="cpu"
        )
        for path, member in zip(paths, ensemble.members, strict=True):
            self._check(path, member)
        return list(ensemble.members), ensemble

    def _check(self, path: Path, model: RewardModel) -> None:
        if model.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise DataError(
                f"{path} reads other tokens than the policy {self.policy.path}: the tokenizers, or the chat options of "
                "policy and rm.base (such as chat_template, template_kwargs, pad_token), differ"
            )


def _critic(ppo: Ppo, policy: Model, settings: config.Engine, reward_models: _RewardModels) -> RewardModel:
    """The layers of the proxy or of the policy under a value head."""
    if ppo.critic_init == "proxy":
        critic = reward_models.load(ppo.proxy)
    else:
        lm = load_causal_lm(policy, dtype=settings.dtype)
        critic = RewardModel(lm, "mlp", reward_models.tokenizer)
        critic.head.to(dtype=lm.dtype)
    if ppo.critic_head == "zero":
        critic.zero_head()
    train_top_layers(critic.lm, ppo.critic_trainable_layers)
    return critic


def _frozen_layers(
    ppo: Ppo, policy: Model, settings: config.Engine, lms: list[CausalLM], members: list[RewardModel]
) -> tuple[FrozenLayers | None, list[bool]]:
    """The layers that all of `lms` keep frozen and equal, and which of the reward models `members` can continue them.

    None where there are none, where they cannot be run apart, or where `ppo` does not reuse them. A reward model
    continues them if it has them too and reads the tokens that were sampled and no others.
    """
    nobody = [False] * len(members)
    depth = shared_depth(*lms) if ppo.reuse_frozen_layers else 0
    if not depth:
        return None, nobody
    base = load_causal_lm(policy, dtype=settings.dtype).requires_grad_(False)
    if base.config._attn_implementation.startswith("flash"):  # a kernel of GPUs only: they must hold the whole models
        for lm in (base, *lms, *(member.lm for member in members)):
            lm.to(distributed.device())
    layers = frozen_layers_of(base, depth, *lms)
    if layers is None:
        return None, nobody

    def continues(member: RewardModel) -> bool:
        member.requires_grad_(False)
        same = member.reads == "end_of_turn" and shared_depth(base, member.lm) >= depth
        return same and frozen_layers_of(base, depth, member.lm) is not None

    return layers, [continues(member) for member in members]
