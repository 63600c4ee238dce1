"""The matrix of a study: its reward models and policies, and the configuration that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from core.config import Config, RewardVariant
from core.errors import ConfigError
from core.files import read_json

SHARED = ("prompts", "preferences", "rm", "bon")

OWN = ("ppo", "eval")


@dataclass(frozen=True, slots=True)
class Arm:
    """One reward model of the matrix."""

    method: str
    pairs: int | None
    """None: all."""
    layers: int | None
    """None: as many as the variant or `rm.num_layers` says."""
    label_noise: float
    seed: int

    @property
    def condition(self) -> str:
        """What the seeds of an arm have in common; `study_results.design` reads it back."""
        parts = [self.method]
        parts += [f"{self.pairs}pairs"] if self.pairs is not None else []
        parts += [f"{self.layers}layers"] if self.layers is not None else []
        parts += [f"noise{self.label_noise:g}"] if self.label_noise else []
        return "-".join(parts)

    @property
    def name(self) -> str:
        return f"{self.condition}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Policy:
    """One PPO run of the study."""

    arm: Arm
    kl_coef: float

    @property
    def name(self) -> str:
        return f"{self.arm.name}-kl{self.kl_coef:g}"


def plan(cfg: Config) -> tuple[list[Arm], list[Policy]]:
    """The arms of the matrix and the policies trained against them.

    Raises:
        DataError: a combiner of `study.ensembles` or `study.sweep` that is not known.
        ConfigError: a method, noise or size that is not there, or a size that something does not fit.
    """
    from study.analysis.combiners import rule as combiner  # it needs torch, which the command line should not wait for

    study = cfg.study
    if cfg.ppo.ensemble:
        raise ConfigError(
            "ppo.ensemble is not part of a study, whose policies have one arm each as proxy: set ppo.ensemble=null"
        )
    for rule in (*study.ensembles, *study.sweep):
        combiner(rule)
    methods = study.methods or tuple(cfg.rm.variants)
    asked = {*methods, *study.ppo_methods}
    if unknown := sorted(asked - set(cfg.rm.variants)):
        raise ConfigError(f"study: no rm.variants {', '.join(unknown)}; there are {', '.join(cfg.rm.variants)}")
    if unused := sorted(set(study.ppo_methods) - set(methods)):
        raise ConfigError(f"study.ppo_methods {', '.join(unused)} are none of study.methods {', '.join(methods)}")
    noises, depths = study.ppo_label_noise or study.label_noise, study.ppo_layers or study.layers or (None,)
    if absent := sorted(set(noises) - set(study.label_noise)):
        raise ConfigError(f"study.ppo_label_noise {absent} are none of study.label_noise {list(study.label_noise)}")
    if absent := sorted(set(study.ppo_layers) - set(study.layers)):
        raise ConfigError(f"study.ppo_layers {absent} are none of study.layers {list(study.layers)}")
    cells = product(methods, study.pairs or (None,), study.layers or (None,), study.label_noise, range(study.seeds))
    arms = [Arm(*cell) for cell in cells]
    chosen = [
        arm for arm in arms
        if arm.method in study.ppo_methods and arm.label_noise in noises and arm.layers in depths
        and arm.seed < study.ppo_seeds
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
    for layers in [n for n in cfg.study.layers if depth and n > depth]:
        faults.append(f"{layers} layers exceed the {depth} of {rm.base.path}")
    for method, layers in dict.fromkeys((arm.method, arm.layers) for arm in arms if arm.layers):
        own = rm.variants[method].trainable_layers
        trained = rm.trainable_layers if own is None else own
        if trained and trained > layers:
            name = "rm.trainable_layers" if own is None else f"rm.variants.{method}.trainable_layers"
            faults.append(f"{name} {trained} exceeds {layers} layers: lower it, or leave that size out")
        if own is None and rm.lora and (rm.lora.top_layers or 0) > layers:
            faults.append(f"rm.lora.top_layers {rm.lora.top_layers} exceeds {layers} layers")
    critic = ppo.critic_trainable_layers if ppo.estimator == "gae" and ppo.critic_init == "proxy" else None
    for layers in dict.fromkeys(p.arm.layers for p in policies if p.arm.layers):
        if critic and critic > layers:
            faults.append(
                f"ppo.critic_trainable_layers {critic} exceeds {layers} layers of the proxy that the critic starts "
                "from: lower it, set ppo.critic_init=policy, or leave that size out of study.ppo_layers"
            )
    return list(dict.fromkeys(faults))


def expanded(cfg: Config, arms: list[Arm]) -> Config:
    """The configuration whose reward models are the arms."""
    variants = {arm.name: variant(cfg.rm.variants[arm.method], arm) for arm in arms}
    rm = cfg.rm.model_copy(update={"variants": variants})
    return Config.model_validate(
        cfg.model_dump() | {"rm": rm.model_dump(), "ppo": cfg.ppo.model_dump() | {"proxy": arms[0].name}}
    )


def variant(base: RewardVariant, arm: Arm) -> RewardVariant:
    size = {} if arm.layers is None else {"num_layers": arm.layers}
    return base.model_copy(update={"pairs": arm.pairs, "label_noise": arm.label_noise, "seed": arm.seed, **size})


def policy_overrides(cfg: Config, policy: Policy) -> list[str]:
    return [
        f"run.name={cfg.run.name}/policies/{policy.name}", f"ppo.proxy={policy.arm.name}",
        f"ppo.kl.coef={policy.kl_coef}",
    ]  # fmt: skip
