"""The models of a PPO run, each under an engine of its own: actor, critic, reference, proxy, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from core.config import Config
from core.data.chat import ChatTokenizer
from core.data.streams import stream_seed
from core.errors import DataError
from core.models.layers import FrozenLayers, shared_depth, train_top_layers
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.training import distributed
from core.training.engine import Engine
from ppo.policy import PolicyModule
from ppo.proxy import LocalProxy, RemoteProxy
from rm.ensemble import AdapterEnsemble, one_base
from rm.heads import zero_output
from rm.model import RewardModel


@dataclass(frozen=True, slots=True)
class Engines:
    actor: Engine
    critic: Engine | None
    """None for estimators that have none."""
    reference: Engine
    """With adapters, the actor."""
    proxy: LocalProxy | RemoteProxy
    frozen_layers: Engine | None
    """The lowest layers, frozen and equal in actor, reference and critic: run once for all three. None for none."""


def make_engines(cfg: Config, reward_models: Path, tokenizer: ChatTokenizer, seed: int) -> Engines:
    """Every rank must call it. `seed` is of the adapter's start.

    Raises:
        DataError: a reward model with another tokenizer than the policy.
    """
    ppo, settings, micro = cfg.ppo, cfg.engine, cfg.ppo.micro_batch
    per_rank, updates = ppo.rollouts // distributed.world_size(), ppo.epochs * ppo.minibatches
    trained = {"micro_batch": micro, "accumulation": per_rank // (micro * ppo.minibatches)}
    base = lambda: load_causal_lm(cfg.policy, dtype=settings.dtype)  # noqa: E731
    module = lambda lm: PolicyModule(lm, cfg.generation.temperature)  # noqa: E731
    torch.manual_seed(stream_seed(seed, "ppo", "adapter"))
    lm = add_lora(base(), ppo.lora) if ppo.lora else base()
    critic = _critic(cfg, reward_models / ppo.proxy, tokenizer) if ppo.estimator == "gae" else None
    # Weights are compared, so before they are sharded.
    frozen_layers = _frozen_layers(cfg, lm, *([critic.lm] if critic else []))
    steps = ppo.steps - ppo.critic_warmup_steps
    actor = Engine(module(lm), settings, optim=ppo.actor, total_steps=steps * updates, **trained)
    if critic:
        critic = Engine(critic, settings, optim=ppo.critic, total_steps=ppo.steps * updates, **trained)
    reference = actor if ppo.lora else Engine(module(base()), settings, micro_batch=micro)
    return Engines(actor, critic, reference, _proxy(cfg, reward_models, tokenizer), frozen_layers)


def _proxy(cfg: Config, reward_models: Path, tokenizer: ChatTokenizer) -> LocalProxy | RemoteProxy:
    ppo, settings = cfg.ppo, cfg.engine
    if ppo.reward_server:
        return RemoteProxy(ppo.reward_server, _reward_model(cfg, reward_models / ppo.proxy, tokenizer))
    paths = [reward_models / name for name in ppo.members]
    if one_base(paths):  # adapters: one backbone in memory, however many members
        ensemble = AdapterEnsemble.from_pretrained(paths, dtype=settings.dtype, attention=cfg.policy.attention)
        for path, member in zip(paths, ensemble.members, strict=True):
            _check_tokenizer(cfg, path, member, tokenizer)
        engines = ensemble.through(Engine(ensemble, settings, micro_batch=ppo.micro_batch))
    else:
        members = [_reward_model(cfg, path, tokenizer) for path in paths]
        engines = [Engine(member, settings, micro_batch=ppo.micro_batch) for member in members]
    return LocalProxy(engines, ppo.combine)


def _critic(cfg: Config, proxy_path: Path, tokenizer: ChatTokenizer) -> RewardModel:
    """The layers of the proxy or of the policy under a value head."""
    if cfg.ppo.critic_init == "proxy":
        critic = _reward_model(cfg, proxy_path, tokenizer)
    else:
        lm = load_causal_lm(cfg.policy, dtype=cfg.engine.dtype)
        critic = RewardModel(lm, "mlp", tokenizer)
        critic.head.to(dtype=lm.dtype)
    if cfg.ppo.critic_head == "zero":
        zero_output(critic)
    train_top_layers(critic.lm, cfg.ppo.critic_trainable_layers)
    return critic


def _frozen_layers(cfg: Config, *lms: torch.nn.Module) -> Engine | None:
    depth = shared_depth(*lms) if cfg.ppo.reuse_frozen_layers else 0
    if not depth:
        return None
    base = load_causal_lm(cfg.policy, dtype=cfg.engine.dtype)
    layers = FrozenLayers(base.to(distributed.device()), depth)
    for lm in lms:
        layers.check(lm.to(distributed.device()))
    return Engine(layers, cfg.engine, micro_batch=cfg.ppo.micro_batch)


def _reward_model(cfg: Config, path: Path, tokenizer: ChatTokenizer) -> RewardModel:
    model = RewardModel.from_pretrained(path, dtype=cfg.engine.dtype, attention=cfg.policy.attention)
    _check_tokenizer(cfg, path, model, tokenizer)
    return model


def _check_tokenizer(cfg: Config, path: Path, model: RewardModel, tokenizer: ChatTokenizer) -> None:
    if model.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(f"{path} has another tokenizer than the policy {cfg.policy.path}")
