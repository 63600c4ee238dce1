"""What a study found, as records."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from bon.pools import Pools
from study.analysis.conditions import Curve
from study.design import Condition


@dataclass
class Series:
    """One RL run: rows of step, prompt_id, proxy, gold and a KL, one a sample."""

    rows: list[dict]
    proxy: str | None = None
    """Name of what it was trained against: one of the pools' proxies, or an ensemble."""
    condition: Condition | None = None
    """Of that reward model, or the ensemble of its seeds."""
    kl_coef: float | None = None
    """Of the KL penalty it was trained with."""
    seed: int | None = None
    """Which of the policies of its condition and KL coefficient; None where that is not known."""
    pool: np.ndarray | None = None
    """[P, N]: the pools by what it was trained against, where that is none of the pools' proxies."""

    def pools(self, pools: Pools | None) -> Pools | None:
        """The pools with what it was trained against among the proxies."""
        if pools is None or self.pool is None or self.proxy is None:
            return pools
        return replace(pools, proxies={**pools.proxies, self.proxy: self.pool})


@dataclass
class Results:
    """Everything that pools and series say; `study.results.results` fills it."""

    pools: Pools
    proxies: dict[str, np.ndarray]
    """Name of a condition or ensemble -> gains [S, P, N]."""
    conditions: dict[str, list[str]]
    """Name of a condition -> its proxies, which differ in their seed only."""
    designs: dict[str, Condition]
    """Name of a condition or ensemble, of best-of-n or a policy's -> what it is."""
    curves: list[Curve] = field(default_factory=list)
    findings: dict[str, dict] = field(default_factory=dict)
    """Name of a condition or ensemble -> its numbers and verdict."""
    policies: dict[str, dict] = field(default_factory=dict)
    """Name of a policy -> its numbers and verdict."""
    pooled: dict[str, dict] = field(default_factory=dict)
    """Name of a condition and KL coefficient -> numbers and verdict of its policies together."""
    policy_differences: list[dict] = field(default_factory=list)
    """Policies of one condition less those of another (`study.analysis.policy_differences`)."""
    kl: list[dict] = field(default_factory=list)
    tail: list[dict] = field(default_factory=list)
    rms: list[dict] = field(default_factory=list)
    members: list[dict] = field(default_factory=list)
    prediction: list[dict] = field(default_factory=list)
    sweep: list[dict] = field(default_factory=list)
    golds: list[dict] = field(default_factory=list)
    ensemble_size: list[dict] = field(default_factory=list)
    """Gold of each ensemble by its number of members (`study.analysis.combiners.by_members`)."""
    about: dict = field(default_factory=dict)
    """The policy and the gold (`study.reward_models.about`); empty where they are not known."""

    def condition_of(self, name: str) -> str | None:
        """The condition that a condition, an ensemble, a policy or policies together belong to; None for baselines and
        strangers."""
        name = {**self.policies, **self.pooled}.get(name, {}).get("condition") or name
        return self.designs[name].members.name if name in self.designs else None

    @property
    def rows(self) -> list[dict]:
        return [row for curve in self.curves for row in curve.rows()]
