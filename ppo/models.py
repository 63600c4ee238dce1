"""The models of a PPO run, each under an engine of its own: actor, critic, reference, proxy, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from core import config
from core.config import Model, Ppo, exact_div
from core.data.chat import ChatTokenizer
from core.data.streams import stream_seed
from core.errors import DataError
from core.models.layers import frozen_layers_of, shared_depth, train_top_layers
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
    """The lowest layers, frozen and equal in actor, reference and critic: run once for all three. None for none."""


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
    # This compares weights, so it comes before they are sharded.
    frozen_layers = _frozen_layers(ppo, policy, settings, *([lm, value_model.lm] if value_model else [lm]))
    steps = ppo.steps - ppo.critic_warmup_steps
    actor = Engine(PolicyModule(lm, temperature), settings, optim=ppo.actor, total_steps=steps * updates, **trained)
    critic = None
    if value_model:
        critic = Engine(value_model, settings, optim=ppo.critic, total_steps=ppo.steps * updates, **trained)
    reference = actor
    if not ppo.lora:
        base = load_causal_lm(policy, dtype=settings.dtype, float32_head=settings.float32_head)
        reference = Engine(PolicyModule(base, temperature), settings, micro_batch=micro)
    return Engines(actor, critic, reference, _proxy(ppo, loader), frozen_layers)


@dataclass(frozen=True, slots=True)
class _RewardModels:
    """Loads the reward models of stage `rm`; refuses one with another tokenizer than the policy."""

    folder: Path
    policy: Model
    settings: config.Engine
    tokenizer: ChatTokenizer

    def load(self, name: str) -> RewardModel:
        path = self.folder / name
        model = RewardModel.from_pretrained(path, dtype=self.settings.dtype, attention=self.policy.attention)
        self._check(path, model)
        return model

    def load_on_one_base(self, names: tuple[str, ...]) -> AdapterEnsemble | None:
        """None where these are not adapters of one base."""
        paths = [self.folder / name for name in names]
        if not one_base(paths):
            return None
        ensemble = AdapterEnsemble.from_pretrained(paths, dtype=self.settings.dtype, attention=self.policy.attention)
        for path, member in zip(paths, ensemble.members, strict=True):
            self._check(path, member)
        return ensemble

    def _check(self, path: Path, model: RewardModel) -> None:
        if model.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise DataError(
                f"{path} reads other tokens than the policy {self.policy.path}: the tokenizers, or the chat options of "
                "policy and rm.base (such as chat_template, template_kwargs, pad_token), differ"
            )


def _proxy(ppo: Ppo, reward_models: _RewardModels) -> LocalProxy | RemoteProxy:
    if ppo.reward_server:
        return RemoteProxy(ppo.reward_server, reward_models.load(ppo.proxy))
    engine = lambda module: Engine(module, reward_models.settings, micro_batch=ppo.micro_batch)  # noqa: E731
    if ensemble := reward_models.load_on_one_base(ppo.members):
        return LocalProxy(ensemble.through(engine(ensemble)), ppo.combine)
    members = [reward_models.load(name) for name in ppo.members]
    return LocalProxy([engine(member) for member in members], ppo.combine)


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


def _frozen_layers(ppo: Ppo, policy: Model, settings: config.Engine, *lms: torch.nn.Module) -> Engine | None:
    """The layers that all of `lms` keep frozen and equal; None where there are none, where they cannot be run apart, or
    where `ppo` does not reuse them."""
    depth = shared_depth(*lms) if ppo.reuse_frozen_layers else 0
    if not depth:
        return None
    base = load_causal_lm(policy, dtype=settings.dtype)
    where = distributed.device()
    layers = frozen_layers_of(base.to(where), depth, *(lm.to(where) for lm in lms))
    return None if layers is None else Engine(layers, settings, micro_batch=ppo.micro_batch)
