"""What a study found, as records."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bon.pools import Pools
from study.analysis.conditions import Curve


@dataclass
class Series:
    """One RL run: rows of step, prompt_id, proxy, gold and a KL, one a sample."""

    rows: list[dict]
    proxy: str | None = None
    """Name of its reward model among the pools' proxies."""


@dataclass
class Results:
    """Everything that pools and series say; `study.results.results` fills it."""

    pools: Pools
    proxies: dict[str, np.ndarray]
    """Condition or ensemble -> gains [S, P, N]."""
    conditions: dict[str, list[str]]
    curves: list[Curve] = field(default_factory=list)
    found: dict[str, dict] = field(default_factory=dict)
    policies: dict[str, dict] = field(default_factory=dict)
    kl: list[dict] = field(default_factory=list)
    tail: list[dict] = field(default_factory=list)
    rms: list[dict] = field(default_factory=list)
    members: list[dict] = field(default_factory=list)
    foretelling: list[dict] = field(default_factory=list)
    sweep: list[dict] = field(default_factory=list)
    golds: list[dict] = field(default_factory=list)

    @property
    def rows(self) -> list[dict]:
        return [row for curve in self.curves for row in curve.rows()]
