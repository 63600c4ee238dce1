"""The plan of a configuration: seconds, memory and disk of each stage, and what that rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.artefacts import read_manifest
from core.config import ENGINE_STAGES, Config
from core.machine import device_name
from pipelines.plan import pools, training
from pipelines.plan.disk import Disk, disk_of, disk_warnings
from pipelines.plan.lengths import Lengths
from pipelines.plan.memory import Memory, memory_of
from pipelines.plan.pools import Phases
from pipelines.plan.rates import Rates
from pipelines.plan.room import memory_warnings
from pipelines.plan.shapes import shape_of
from pipelines.plan.sizes import Sizes
from pipelines.plan.work import Start
from pipelines.stages import ALWAYS

COUNTS: dict[str, Callable[[Sizes], Phases]] = {
    "prompts": pools.prompts, "preferences": pools.preferences, "rm": training.rm, "bon": pools.bon,
    "ppo": training.ppo, "eval": pools.evaluate,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Where:
    """The machine that is planned for."""

    rates: Rates
    ranks: Mapping[str, int]
    """Of each stage that has several."""
    memory: float
    """Bytes of one GPU, or of the whole machine on CPU."""
    gpus: int = 0
    host: float | None = None
    """Bytes of host memory beside GPUs; None: not known."""
    report_seconds: float | None = None
    """Of a finished report on this machine."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    name: str
    phases: dict[str, float]
    """Seconds of each phase of the stage's own function."""
    before: float
    """Seconds until that is called: processes and imports."""
    memory: Memory
    disk: Disk
    ranks: int
    times: int = 1
    """How often it runs; seconds are of one time, disk too."""
    at_once: int = 1
    """How many of these times are at the same time."""
    rounds: float = 1
    """How many of these times follow each other. Those that share cores take as long together as one after another."""
    ran: float | None = None
    """Seconds in the manifest of this run, if the stage is finished and was run on this machine."""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def total(self) -> float:
        return self.rounds * (self.seconds + self.before)


@dataclass(frozen=True, slots=True)
class Plan:
    run: str
    basis: str
    stages: list[StagePlan]
    peak_disk: float
    notes: list[str]
    warnings: list[str]
    gpus: int = 0
    price: float | None = None
    """Of an hour of one GPU, or of the machine on CPU."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(stage.total for stage in self.stages)

    def cost(self, seconds: float) -> float | None:
        """All GPUs are paid for while a stage runs, whether it uses them or not."""
        return None if self.price is None else seconds / 3600 * self.price * max(1, self.gpus)


def sizes_of(cfg: Config, lengths: Lengths, where: Where) -> Sizes:
    """The sizes of the models of a configuration.

    Raises:
        ConfigError: a model whose config.json cannot be read.
    """
    policy = shape_of(cfg.policy)
    base = policy if cfg.rm.base.path == cfg.policy.path else shape_of(cfg.rm.base)
    gold = None if cfg.gold.kind in ("judge", "linear") else shape_of(cfg.policy.model_copy(update={
        "path": cfg.gold.path, "revision": None,
    }))  # fmt: skip
    return Sizes(cfg, lengths, policy, base, gold, 1, where.memory if where.gpus else None)


def plan_stage(name: str, sizes: Sizes, where: Where, times: int = 1, at_once: int = 1) -> StagePlan:
    sizes = replace(sizes, ranks=where.ranks.get(name, 1))
    phases = pools.report(where.report_seconds) if name == "report" else COUNTS[name](sizes)
    seconds = {phase: sum(where.rates.seconds(item) for item in items) for phase, items in phases.items()}
    before = where.rates.seconds(Start("command")) + where.rates.seconds(Start("process", ranks=sizes.ranks))
    gpu_memory = where.memory if where.gpus else None
    memory, disk = memory_of(sizes, name, gpu_memory), disk_of(sizes, name)
    rounds = times / at_once if where.gpus else times
    ran = None if where.gpus or times > 1 else finished_seconds(sizes.cfg.run_dir / name)
    return StagePlan(name, seconds, before, memory, disk, sizes.ranks, times, at_once, rounds, ran)


def finished_seconds(folder: Path) -> float | None:
    """Seconds of a finished stage of this machine."""
    manifest = read_manifest(folder)
    return manifest["seconds"] if manifest and manifest.get("device") == device_name() else None


def make_plan(cfg: Config, lengths: Lengths, where: Where, price: float | None = None) -> Plan:
    """The plan of the seven stages of a run."""
    sizes = sizes_of(cfg, lengths, where)
    return assemble(cfg, [(plan_stage(name, sizes, where), sizes) for name in ALWAYS], lengths, where, price)


def assemble(
    cfg: Config, stages: list[tuple[StagePlan, Sizes]], lengths: Lengths, where: Where, price: float | None
) -> Plan:
    """A plan of these stages, with its warnings."""
    warnings = [
        f"{stage}: the configuration does not fit {ranks} ranks: {fault}"
        for stage in ENGINE_STAGES
        for ranks in ([where.ranks[stage]] if stage in where.ranks else [])
        for fault in cfg.batch_faults(stage, ranks)
    ]
    for stage, sizes in stages:
        sizes = replace(sizes, ranks=stage.ranks)
        all_at_once = replace(sizes, ranks=stage.ranks * stage.at_once)
        found = memory_warnings(
            all_at_once, stage.name, stage.memory, where.memory, gpu=bool(where.gpus), host=where.host
        )
        found += pools.idle(sizes, stage.name)
        warnings += [line for line in found if line not in warnings]
    disks = {f"{i} {stage.name}": disk for i, (stage, _) in enumerate(stages) for disk in [_times(stage)]}
    peak, lines = disk_warnings(disks, cfg.run.dir)
    notes = [*lengths.notes, *_models(stages), *where.rates.remarks()]
    notes += ["stage sft is not counted: its cost is in docs/sft.md"] if cfg.sft else []
    only = [stage for stage, _ in stages]
    return Plan(str(cfg.run_dir), where.rates.basis, only, peak, notes, warnings + lines, where.gpus, price)


def _times(stage: StagePlan) -> Disk:
    left = stage.times * stage.disk.left
    return Disk(left, left - stage.disk.left + stage.disk.peak)


def _models(stages: list[tuple[StagePlan, Sizes]]) -> list[str]:
    sizes = stages[0][1]
    shapes = {shape.name: shape for shape in (sizes.policy, sizes.base, sizes.gold) if shape}
    return [f"{name}: {shape.params / 1e6:,.0f}M parameters ({shape.source})" for name, shape in shapes.items()]


def as_json(plan: Plan) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "run": plan.run,
        "rests_on": plan.basis,
        "gpus": plan.gpus,
        "seconds": round(plan.seconds, 1),
        "cost": plan.cost(plan.seconds),
        "disk_peak_bytes": round(plan.peak_disk),
        "stages": [_stage_json(plan, stage) for stage in plan.stages],
        "assumptions": plan.notes,
        "warnings": plan.warnings,
        **plan.extra,
    }


def _stage_json(plan: Plan, stage: StagePlan) -> Mapping[str, Any]:
    return {
        "stage": stage.name,
        "times": stage.times,
        "at_once": stage.at_once,
        "seconds": round(stage.seconds, 1),
        "seconds_before": round(stage.before, 1),
        "seconds_of_finished_run": stage.ran,
        "seconds_of_phases": {name: round(value, 2) for name, value in stage.phases.items()},
        "cost": plan.cost(stage.total),
        "ranks": stage.ranks,
        "memory_bytes_per_rank": round(stage.memory.total),
        "memory_parts": {name: round(value) for name, value in stage.memory.parts.items()},
        "host_bytes_per_rank_while_loading": round(stage.memory.whole_on_host),
        "disk_bytes": round(stage.disk.left),
        "disk_peak_bytes": round(stage.disk.peak),
    }
