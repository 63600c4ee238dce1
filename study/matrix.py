"""The matrix of a study: its reward models and policies, and the configuration that holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from core.config import Config, RewardVariant
from core.errors import ConfigError
from core.files import read_json
from pipelines.stages import SFT, in_use
from rm.combine import combiner
from study.analysis.combiners import rule as sweep_rule
from study.design import Arm, Condition, Policy

SHARED = ("prompts", "preferences", "rm", "bon")

OWN = ("ppo", "eval")


def shared_stages(cfg: Config) -> list[str]:
    """Stages that all policies of the study have in common, in their order."""
    return [name for name in in_use(cfg) if name in SHARED or name == SFT]


def plan(cfg: Config) -> tuple[list[Arm], list[Policy]]:
    """The arms of the matrix and the policies trained against them.

    Raises:
        DataError: a combiner of `study.ensembles` or `study.sweep` that is not known.
        ConfigError: a variant, noise or size that does not exist, a size that does not fit, two arms of one name.
    """
    study = cfg.study
    if cfg.ppo.ensemble:
        raise ConfigError(
            "a study takes its ensembles from study.ppo_ensembles, which combines the seeds of a condition: set "
            "ppo.ensemble=null"
        )
    for rule in study.sweep:
        sweep_rule(rule)
    for rule in (*study.ensembles, *study.ppo_ensembles):
        combiner(rule)
    variants = study.variants or tuple(cfg.rm.variants)
    if unknown := sorted({*variants, *study.ppo_variants} - set(cfg.rm.variants)):
        raise ConfigError(f"study: no rm.variants {', '.join(unknown)}; there are {', '.join(cfg.rm.variants)}")
    if unused := sorted(set(study.ppo_variants) - set(variants)):
        raise ConfigError(f"study.ppo_variants {', '.join(unused)} are none of study.variants {', '.join(variants)}")
    if unused := sorted(set(study.ppo_ensemble_variants) - set(study.ppo_variants)):
        raise ConfigError(
            f"study.ppo_ensemble_variants {', '.join(unused)} are none of study.ppo_variants "
            f"{', '.join(study.ppo_variants)}"
        )
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
        and arm.condition.layers in depths
    ]  # fmt: skip
    policies = policies_of(cfg, chosen)
    if faults := size_faults(cfg, arms, policies):
        raise ConfigError("study.layers do not fit:\n  " + "\n  ".join(faults))
    return arms, policies


def policies_of(cfg: Config, chosen: Sequence[Arm]) -> list[Policy]:
    """The policies that are trained against these arms: each of the first seeds alone, and ensembles of all seeds.

    Raises:
        ConfigError: ensembles of fewer than two seeds, or whose policies would not differ; two policies of one name.
    """
    study = cfg.study
    first = [arm for arm in chosen if arm.seed < study.ppo_seeds]
    policies = [Policy((arm,), coef, arm.seed) for arm, coef in product(first, study.kl_coefs)]
    more = [coef for coef in study.kl_sweep if coef not in study.kl_coefs]
    policies += [Policy((arm,), coef, arm.seed) for arm in first[:1] for coef in more]
    if study.kl_sweep and not first:
        raise ConfigError("study.kl_sweep needs study.ppo_variants: no policy is trained without them")
    if not study.ppo_ensembles:
        return policies
    if study.seeds < 2:
        raise ConfigError("study.ppo_ensembles combines the seeds of a condition: set study.seeds to 2 or more")
    if study.ppo_seeds > 1 and "sampling" not in study.seeds_differ_in:
        raise ConfigError(
            "policies against an ensemble differ in their sampling alone: add sampling to study.seeds_differ_in, or "
            "set study.ppo_seeds=1"
        )
    groups: dict[Condition, list[Arm]] = {}
    for arm in chosen:
        if arm.condition.variant in (study.ppo_ensemble_variants or study.ppo_variants):
            groups.setdefault(arm.condition, []).append(arm)
    cells = product(groups.values(), study.ppo_ensembles, range(study.ppo_seeds), study.kl_coefs)
    policies += [Policy(tuple(members), coef, seed, rule) for members, rule, seed, coef in cells]
    if len({policy.name for policy in policies}) < len(policies):
        raise ConfigError("study: two policies have one name (a variant whose name looks like an ensemble?): rename it")
    return policies


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
    for layers in dict.fromkeys(p.condition.layers for p in policies):
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
    """What distinguishes a policy's run from the study's configuration."""
    seed = policy.seed if "sampling" in cfg.study.seeds_differ_in else 0
    found = [
        f"run.name={cfg.run.name}/policies/{policy.name}", f"ppo.proxy={policy.arms[0].name}",
        f"ppo.kl.coef={policy.kl_coef}", f"ppo.seed={cfg.ppo.seed + seed}",
    ]  # fmt: skip
    if policy.rule:
        ensemble = {"members": [arm.name for arm in policy.arms], "combine": policy.rule}
        found.append(f"ppo.ensemble={json.dumps(ensemble)}")
    return found
