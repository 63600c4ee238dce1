"""Which engine settings the models of a stage get, read in one place, and what ZeRO shards of each."""

from __future__ import annotations

from core.config import Config, Engine


def rm_settings(cfg: Config) -> Engine:
    """Of the reward models in stage `rm`."""
    return cfg.engine


def actor_settings(cfg: Config) -> Engine:
    """Of what stage `ppo` trains: actor and critic."""
    return cfg.engine


def frozen_settings(cfg: Config) -> Engine:
    """Of what stage `ppo` runs without training: reference, proxy, shared frozen layers."""
    return cfg.engine


def zero_of(settings: Engine, *, trained: bool) -> int:
    """The ZeRO stage of an engine: stages 1 and 2 shard only what is trained (`core.training.engine`)."""
    return settings.zero_stage if trained or settings.zero_stage == 3 else 0


def zeros(cfg: Config) -> list[int]:
    """The ZeRO stages that engines of the stages rm and ppo have."""
    found = {zero_of(settings, trained=True) for settings in (rm_settings(cfg), actor_settings(cfg))}
    return sorted(found | {zero_of(frozen_settings(cfg), trained=False)})
