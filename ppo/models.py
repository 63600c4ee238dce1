"""The models of a PPO run, each under an engine of its own: actor, critic, reference, proxy, and what they share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from core import config
from core.config import Model, Ppo, exact_div
from core.data.chat import ChatTokenizer
from core.data.streams import stream_seed
from core.errors import DataError
from core.models import CausalLM
from core.models.compiled import compile_layers
from core.models.layers import FrozenLayers, frozen_layers_of, frozen_levels_of, shared_depth, train_top_layers
from core.models.loading import load_causal_lm
from core.models.logits import leave_out_lm_head
from core.models.lora import add_lora
from core.models.shared_weights import SharedWeights
from core.training import distributed
from core.training.engine import Engine, frozen_zero_stage, shards
from core.training.sharding import Shards, num_bytes
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
    proxy: LocalProxy | RemoteProxy | None
    """None where the reward models have no weight."""
    frozen_layers: Engine | None
    """The lowest layers of the policy, frozen and equal in several of these models, and run once for them. Each
    continues them where its own frozen layers end (`Engine.continues`). None for none."""


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
    once = _InMemoryOnce(settings)
    lm = once.trained(make_policy(ppo, policy, settings, seed))
    loader = _RewardModels(reward_models, policy, settings, tokenizer)
    value_model = None
    if ppo.estimator == "gae":
        if ppo.critic_lora and settings.zero_stage == 3 and distributed.rank() == 0:
            logging.getLogger(__name__).warning(
                "ppo.critic_lora: at engine.zero_stage 3 the critic has a backbone of its own, divided among the "
                "ranks, since two ZeRO-3 engines cannot gather one backbone (docs/scale.md)"
            )
        value_model = _critic(ppo, policy, settings, loader, seed)
        once.trained(value_model.lm)
    shares = ppo.reuse_frozen_layers and any(map(shared_depth, [lm, *([value_model.lm] if value_model else [])]))
    alike = len(ppo.held_members) + (ppo.lora is None) + shares
    # The frozen models are taken to be as large as the policy: they are not there yet.
    of_frozen = shards(settings, frozen_zero_stage(settings, alike * num_bytes(lm)))
    members, base_of_members = loader.members(ppo, of_frozen, once)
    layers, depths = None, _Depths(0, 0, [0] * len(members))
    if shares:  # this runs layers apart from their models, so it comes before engines run them
        layers, depths = _frozen_layers(policy, settings, lm, value_model, members, of_frozen, once)
    steps = ppo.steps - ppo.critic_warmup_steps
    actor = Engine(PolicyModule(lm, temperature), settings, optim=ppo.actor, total_steps=steps * updates, **trained)
    actor.continues = depths.actor
    critic = None
    if value_model:
        critic = Engine(value_model, settings, optim=ppo.critic, total_steps=ppo.steps * updates, **trained)
        critic.continues = depths.critic
    alike = len(members) + (ppo.lora is None) + (layers is not None)

    def frozen(module: nn.Module) -> Engine:
        return Engine(module, settings, micro_batch=micro, alike=alike)

    reference = actor
    if not ppo.lora:
        base = load_causal_lm(policy, dtype=settings.dtype, float32_head=settings.float32_head, shards=of_frozen)
        if settings.compile and settings.frozen_zero_stage != 3:  # or rounding alone would be a KL to the actor
            compile_layers(base)
        reference = frozen(PolicyModule(once.frozen(base), temperature))
        reference.continues = depths.actor
    if ppo.reward_server:
        proxy: LocalProxy | RemoteProxy | None = RemoteProxy(ppo.reward_server, loader.load(ppo.proxy, of_frozen))
    elif not members:
        proxy = None
    else:
        of_members = base_of_members.through(frozen(base_of_members)) if base_of_members else map(frozen, members)
        proxy = LocalProxy(list(of_members), ppo.combine, depths.members)
    return Engines(actor, critic, reference, proxy, frozen(layers) if layers else None)


def make_policy(ppo: Ppo, policy: Model, settings: config.Engine, seed: int) -> CausalLM:
    """The policy as its training begins; `seed` is that of `make_engines`."""
    torch.manual_seed(stream_seed(seed, "ppo", "adapter"))
    lm = load_causal_lm(
        policy, dtype=settings.dtype, float32_head=settings.float32_head, shards=shards(settings, settings.zero_stage)
    )
    return add_lora(lm, ppo.lora) if ppo.lora else lm


def make_critic(
    ppo: Ppo, policy: Model, settings: config.Engine, reward_models: Path, tokenizer: ChatTokenizer, seed: int
) -> RewardModel:
    """The critic as its training begins; the arguments are those of `make_engines`."""
    return _critic(ppo, policy, settings, _RewardModels(reward_models, policy, settings, tokenizer), seed)


class _InMemoryOnce:
    """Lets the models of a run share their equal frozen weights, each as soon as it is read.

    Models that ZeRO-3 divides, or may divide, keep their own (`core.models.shared_weights`).
    """

    def __init__(self, settings: config.Engine):
        self._weights = SharedWeights()
        self._of_trained, self._of_frozen = settings.shares_trained, settings.shares_frozen

    def trained(self, lm: CausalLM) -> CausalLM:
        """A model of which a part is trained."""
        if self._of_trained:
            self._weights.take(lm)
        return lm

    def frozen(self, lm: CausalLM) -> CausalLM:
        lm.requires_grad_(False)
        if self._of_frozen:
            self._weights.take(lm)
        return lm


@dataclass(frozen=True, slots=True)
class _RewardModels:
    """Loads the reward models of stage `rm`; refuses one with another tokenizer than the policy."""

    folder: Path
    policy: Model
    settings: config.Engine
    tokenizer: ChatTokenizer

    def load(self, name: str, shards: Shards | None) -> RewardModel:
        """In host memory, where an engine puts it on the GPU; or divided among the ranks by `shards`. It has no LM head
        of its own, which neither rewards nor values need."""
        path = self.folder / name
        model = RewardModel.from_pretrained(
            path, dtype=self.settings.dtype, attention=self.policy.attention, where="cpu", shards=shards,
            lm_head=False,
        )  # fmt: skip
        self._check(path, model)
        return model

    def members(
        self, ppo: Ppo, shards: Shards | None, once: _InMemoryOnce
    ) -> tuple[list[RewardModel], AdapterEnsemble | None]:
        """The reward models that the ranks hold as the proxy, and what holds them where they are adapters of one
        base."""
        paths = [self.folder / name for name in ppo.held_members]
        if not paths:
            return [], None
        if not one_base(paths):
            members = []
            for name in ppo.held_members:
                members.append(self.load(name, shards))
                once.frozen(members[-1].lm)
            return members, None
        ensemble = AdapterEnsemble.from_pretrained(
            paths, dtype=self.settings.dtype, attention=self.policy.attention, where="cpu", shards=shards
        )
        for path, member in zip(paths, ensemble.members, strict=True):
            self._check(path, member)
        once.frozen(ensemble.lm)
        return list(ensemble.members), ensemble

    def _check(self, path: Path, model: RewardModel) -> None:
        if model.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise DataError(
                f"{path} reads other tokens than the policy {self.policy.path}: the tokenizers, or the chat options of "
                "policy and rm.base (such as chat_template, template_kwargs, pad_token), differ"
            )


def _critic(ppo: Ppo, policy: Model, settings: config.Engine, reward_models: _RewardModels, seed: int) -> RewardModel:
    """The layers of the proxy or of the policy under a value head, without an LM head of their own."""
    divided = shards(settings, settings.zero_stage)
    if ppo.critic_init == "proxy":
        critic = reward_models.load(ppo.proxy, divided)
    else:
        lm = load_causal_lm(policy, dtype=settings.dtype, shards=divided)
        leave_out_lm_head(lm)
        critic = RewardModel(lm, "mlp", reward_models.tokenizer)
        critic.head.to(dtype=lm.dtype)
    if ppo.critic_head == "zero":
        critic.zero_head()
    if ppo.critic_lora:
        torch.manual_seed(stream_seed(seed, "ppo", "critic adapter"))
        critic.lm = add_lora(critic.lm, ppo.critic_lora)
    else:
        train_top_layers(critic.lm, ppo.critic_trainable_layers)
    return critic


class _Depths(NamedTuple):
    """How many of the policy's lowest layers each model takes from those that are run once; 0 for none."""

    actor: int
    critic: int
    members: list[int]


def _frozen_layers(
    policy: Model, settings: config.Engine, lm: CausalLM, critic: RewardModel | None, members: list[RewardModel],
    of_frozen: Shards | None, once: _InMemoryOnce,
) -> tuple[FrozenLayers | None, _Depths]:  # fmt: skip
    """The layers of the policy that actor and critic keep frozen, and where each model continues them.

    None where there are none, or where they cannot be run apart. A reward model of the proxy continues them if it has
    them too and reads the tokens that were sampled and no others.
    """
    nobody = _Depths(0, 0, [0] * len(members))
    base = once.frozen(load_causal_lm(policy, dtype=settings.dtype, shards=of_frozen))
    if base.config._attn_implementation.startswith("flash"):  # a kernel of GPUs only: they must hold the whole models
        for model in (base, lm, *([critic.lm] if critic else []), *(member.lm for member in members)):
            model.to(distributed.device())
    of_actor, of_critic = shared_depth(base, lm), shared_depth(base, critic.lm) if critic else 0
    levels = sorted({of_actor, of_critic} - {0})
    if not levels:
        return None, nobody
    continued = [(lm, of_actor)] if of_actor else []
    continued += [(critic.lm, of_critic)] if critic and of_critic else []
    layers = frozen_levels_of(base, *continued)
    if layers is None:
        return None, nobody

    def depth(member: RewardModel) -> int:
        member.requires_grad_(False)
        if member.reads != "end_of_turn":
            return 0
        has = shared_depth(base, member.lm)
        found = max((level for level in levels if level <= has), default=0)
        return found if found and frozen_layers_of(base, found, member.lm) else 0

    return layers, _Depths(of_actor, of_critic, [depth(member) for member in members])
