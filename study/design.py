"""The design of a study as records: what was trained and how. Names are for people; nothing is read back from them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Condition:
    """What the seeds of a cell of the study have in common."""

    variant: str
    """How the reward model was trained: a name of `rm.variants`, or what other tools call their proxy."""
    pairs: int | None = None
    """Training pairs; None: all, or not known."""
    layers: int | None = None
    """Of the reward model; None: as many as the variant or `rm.num_layers` says, or not known."""
    label_noise: float | None = None
    """Share of its training labels that were flipped; None: not known, or as the variant says."""
    rule: str | None = None
    """How its seeds are combined into one proxy; None: each is a proxy of its own."""
    combined: int = 0
    """Seeds that the rule combines."""

    @property
    def name(self) -> str:
        """For tables, figures and folders."""
        parts = [self.variant]
        parts += [f"{self.pairs}pairs"] if self.pairs is not None else []
        parts += [f"{self.layers}layers"] if self.layers is not None else []
        parts += [f"noise{self.label_noise:g}"] if self.label_noise else []
        return "-".join(parts) + (f" x {self.combined}, {self.rule}" if self.rule else "")

    def ensemble(self, rule: str, seeds: int) -> Condition:
        """The condition in which a rule combines the seeds of this one."""
        return replace(self, rule=rule, combined=seeds)

    @property
    def members(self) -> Condition:
        """The condition whose seeds an ensemble combines; itself where it is none."""
        return replace(self, rule=None, combined=0)

    @property
    def cell(self) -> tuple[int | None, int | None, float | None]:
        """Sizes and noise: what conditions of one variant differ in."""
        return self.pairs, self.layers, self.label_noise


@dataclass(frozen=True, slots=True)
class Arm:
    """One reward model of the study."""

    condition: Condition
    seed: int

    @property
    def name(self) -> str:
        return f"{self.condition.name}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Policy:
    """One PPO run of the study."""

    arms: tuple[Arm, ...]
    """The reward models that it is trained against: one, or all seeds of a condition. The critic starts from the
    first."""
    kl_coef: float
    seed: int
    """Of the study: that of its reward model, or where these are combined, of PPO's own draws alone."""
    rule: str | None = None
    """How their rewards are combined; None for a single one."""

    @property
    def condition(self) -> Condition:
        """What it has in common with the policies of other seeds."""
        own = self.arms[0].condition
        return own.ensemble(self.rule, len(self.arms)) if self.rule else own

    @property
    def proxy(self) -> str:
        """What it optimises, for tables and figures."""
        return self.condition.name if self.rule else self.arms[0].name

    @property
    def name(self) -> str:
        """For tables, figures and folders."""
        proxy = self.proxy
        if self.rule:
            members = f"{self.condition.members.name}-x{len(self.arms)}"
            proxy = f"{members}-{self.rule.replace(':', '')}-seed{self.seed}"
        return f"{proxy}-kl{self.kl_coef:g}"
