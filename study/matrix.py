"""The matrix of a study: its reward models and policies, and the configuration that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from core.config import Config, RewardVariant
from core.errors import ConfigError
from core.files import read_json
from study.analysis.combiners import rule as combiner
from study.design import Arm, Condition, Policy

SHARED = ("prompts", "preferences", "rm", "bon")

OWN = ("ppo", "eval")


def plan(cfg: Config) -> tuple[list[Arm], list[Policy]]:
    """The arms of the matrix and the policies trained against them.

    Raises:
        DataError: a combiner of `study.ensembles` or `study.sweep` that is not known.
        ConfigError: a variant, noise or size that does not exist, a size that does not fit, two arms of one name.
    """
    study = cfg.study
    if cfg.ppo.ensemble:
        raise ConfigError(
            "ppo.ensemble is not part of a study, whose policies have one arm each as proxy: set ppo.ensemble=null"
        )
    for rule in (*study.ensembles, *study.sweep):
        combiner(rule)
    variants = study.variants or tuple(cfg.rm.variants)
    if unknown := sorted({*variants, *study.ppo_variants} - set(cfg.rm.variants)):
        raise ConfigError(f"study: no rm.variants {', '.join(unknown)}; there are {', '.join(cfg.rm.variants)}")
    if unused := sorted(set(study.ppo_variants) - set(variants)):
        raise ConfigError(f"study.ppo_variants {', '.join(unused)} are none of study.variants {', '.join(variants)}")
    noises, depths = study.ppo_label_noise or study.label_noise, study.ppo_layers or study.layers or (None,)
    if absent := sorted(set(noises) - set(study.label_noise)):
        raise ConfigError(f"study.ppo_label_noise {absent} are none of study.label_noise {list(study.label_noise)}")
    if absent := sorted(set(study.ppo_layers) - set(study.layers)):
        raise ConfigError(f"study.ppo_layers {absent} are none of study.layers {list(study.layers)}")
    cells = product(variants, study.pairs or (None,), study.layers or (None,), study.label_noise)
    arms = [Arm(Condition(*cell), seed) for cell in cells for seed in range(study.seeds)]
    if len(twice := {arm.name for arm in arms}) < len(arms):
        raise ConfigError(
            f"study: {len(arms) - len(twice)} arms have the name of another (a variant whose name looks like a size?): "
            "rename the variants in rm.variants"
        )
    chosen = [
        arm for arm in arms
        if arm.condition.variant in study.ppo_variants and arm.condition.label_noise in noises
        and arm.condition.layers in depths and arm.seed < study.ppo_seeds
    ]  # fmt: skip
    policies = [Policy(arm, coef) for arm, coef in product(chosen, study.kl_coefs)]
    if faults := size_faults(cfg, arms, policies):
        raise ConfigError("study.layers do not fit:\n  " + "\n  ".join(faults))
    return arms, policies


def size_faults(cfg: Config, arms: list[Arm], policies: list[Policy]) -> list[str]:
    """What cannot be done with the sizes that `study.layers` asks for, one line each: hours before a stage says so."""
    rm, ppo, faults = cfg.rm, cfg.ppo, []
    file = Path(rm.base.path) / "config.json"
    depth = read_json(file).get("num_hidden_layers") if file.is_file() else None
    for size in [n for n in cfg.study.layers if depth and n > depth]:
        faults.append(f"{size} layers exceed the {depth} of {rm.base.path}")
    for name, layers in dict.fromkeys((a.condition.variant, a.condition.layers) for a in arms):
        if layers is None:
            continue
        own = rm.variants[name].trainable_layers
        trained = rm.trainable_layers if own is None else own
        if trained and trained > layers:
            field = "rm.trainable_layers" if own is None else f"rm.variants.{name}.trainable_layers"
            faults.append(f"{field} {trained} exceeds {layers} layers: lower it, or leave that size out")
        if own is None and rm.lora and (rm.lora.top_layers or 0) > layers:
            faults.append(f"rm.lora.top_layers {rm.lora.top_layers} exceeds {layers} layers")
    critic = ppo.critic_trainable_layers if ppo.estimator == "gae" and ppo.critic_init == "proxy" else None
    for layers in dict.fromkeys(p.arm.condition.layers for p in policies):
        if critic and layers and critic > layers:
            faults.append(
                f"ppo.critic_trainable_layers {critic} exceeds {layers} layers of the proxy that the critic starts "
                "from: lower it, set ppo.critic_init=policy, or leave that size out of study.ppo_layers"
            )
    return list(dict.fromkeys(faults))


def expanded(cfg: Config, arms: list[Arm]) -> Config:
    """The configuration whose reward models are the arms."""
    differ = cfg.study.seeds_differ_in
    variants = {arm.name: variant(cfg.rm.variants[arm.condition.variant], arm, differ) for arm in arms}
    rm = cfg.rm.model_copy(update={"variants": variants})
    return Config.model_validate(
        cfg.model_dump() | {"rm": rm.model_dump(), "ppo": cfg.ppo.model_dump() | {"proxy": arms[0].name}}
    )


def variant(base: RewardVariant, arm: Arm, differ: Sequence[str]) -> RewardVariant:
    """The variant of an arm.

    Args:
        differ: `study.seeds_differ_in`.
    """
    cell = arm.condition
    size = {} if cell.layers is None else {"num_layers": cell.layers}
    seeds = {"seed": arm.seed if "training" in differ else 0, "data_seed": arm.seed if "data" in differ else 0}
    return base.model_copy(update={"pairs": cell.pairs, "label_noise": cell.label_noise, **seeds, **size})


def policy_overrides(cfg: Config, policy: Policy) -> list[str]:
    seed = policy.arm.seed if "sampling" in cfg.study.seeds_differ_in else 0
    return [
        f"run.name={cfg.run.name}/policies/{policy.name}", f"ppo.proxy={policy.arm.name}",
        f"ppo.kl.coef={policy.kl_coef}", f"ppo.seed={cfg.ppo.seed + seed}",
    ]  # fmt: skip
