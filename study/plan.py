"""`grm plan`: what a configuration will cost before it runs, with what each number rests on. It refuses nothing.

    grm plan --config F                   seconds, memory and disk of each stage
    grm plan --config F --measure         measure this machine first: one or two minutes, kept for later plans
    grm plan --config F --gpus 8xH100     the same on GPUs, from published peaks
    grm plan --config F --check RUN       predicted beside actual seconds of a finished run
    grm plan --config F --curves FOLDER   how cost grows, as measured: cost-curves.md and its figure

Where the configuration has a section `study`, its matrix is planned. docs/plan.md explains the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from core.artefacts import read_manifest
from core.config import Config, Study
from core.config.load import load
from core.environment import num_gpus
from core.errors import ConfigError
from pipelines import launch, runs
from pipelines.plan import measured, table
from pipelines.plan.lengths import Lengths, lengths_of
from pipelines.plan.measure import groups, measure
from pipelines.plan.plan import (
    Plan,
    StagePlan,
    Where,
    as_json,
    assemble,
    finished_seconds,
    make_plan,
    plan_stage,
    sizes_of,
)
from pipelines.plan.rates import GPUS, ON_GPU, FromPeaks, rough
from pipelines.plan.shapes import shape_of
from pipelines.plan.sizes import Sizes
from pipelines.stages import ALWAYS
from study.at_once import parts_of
from study.matrix import OWN, SHARED, expanded, policy_overrides
from study.matrix import plan as matrix


def main(argv: list[str]) -> int:
    options = parser().parse_intermixed_args(argv)
    cfg = load(options.config or ["configs/offline.yaml"], options.overrides)
    if options.gpus and options.measure:
        raise ConfigError("--measure measures this machine, and --gpus plans for another one: give one of them")
    ranks = ranks_of(cfg)
    file = measured.cache_file(cfg, options.cache)
    if options.measure:
        print("measuring this machine: some minutes", file=sys.stderr)
        measure(cfg, file, groups(cfg, ranks))
        print(f"measured: {file}", file=sys.stderr)
    if options.curves:
        from pipelines.plan.curves import write_curves

        print(write_curves(file, options.curves))
        return 0
    if options.gpus:
        where, known = on_gpus(cfg, options.gpus, options.host_gib), None
    else:
        where, known = on_this_machine(cfg, file, ranks)
    lengths = lengths_of(cfg, options.share, finished_responses(cfg) or known)
    plan = of_configuration(cfg, lengths, where, options.price)
    if options.check:
        print(table.check(plan, runs.folder_of(options.check)))
        return 0
    print(json.dumps(as_json(plan), indent=1) if options.json else table.as_text(plan, phases=options.phases))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="grm plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("overrides", nargs="*", metavar="a.b=value", help="config values, laid over the files")
    made.add_argument("--config", "-c", action="append", help="YAML file; repeat to lay files over each other")
    made.add_argument("--gpus", metavar="NxKIND", help=f"plan for GPUs, such as 8xH100; kinds: {', '.join(GPUS)}")
    made.add_argument("--host-gib", type=float, metavar="GIB", help="with --gpus: host memory, to be checked too")
    made.add_argument("--measure", action="store_true", help="measure this machine with the configuration's policy")
    made.add_argument("--cache", type=Path, help="folder of measurements (default: grm/plan in the XDG cache folder)")
    made.add_argument("--share", type=float, help="mean length of responses, as a share of generation.max_new_tokens")
    made.add_argument("--price", type=float, help="of an hour of one GPU (on CPU: of the machine), to show costs")
    made.add_argument("--phases", action="store_true", help="show what each stage consists of")
    made.add_argument("--json", action="store_true", help="print all numbers as JSON")
    made.add_argument("--check", type=Path, metavar="RUN", help="compare with the finished stages of a run")
    made.add_argument("--curves", type=Path, metavar="FOLDER", help="write how cost grows, as it was measured")
    return made


def ranks_of(cfg: Config, gpus: int | None = None) -> dict[str, int]:
    """Ranks of the stages that may have several, on this machine or on one with so many GPUs: of a study's policies on
    the share of each."""
    gpus, cores = num_gpus() if gpus is None else gpus, len(os.sched_getaffinity(0))
    parts = parts_of(cfg.study.policies_at_once, gpus, cores)
    several = [name for name, stage in ALWAYS.items() if stage.distributed or stage.divided]
    of_all = {name: launch.num_processes(name, cfg, gpus) for name in several}
    return of_all | {name: launch.num_processes(name, cfg, gpus // parts, max(1, cores // parts)) for name in OWN}


def on_gpus(cfg: Config, text: str, host_gib: float | None = None) -> Where:
    """A machine with GPUs from published peaks; ConfigError for a kind that is not known."""
    count, _, kind = text.rpartition("x")
    known = {name.lower(): device for name, device in GPUS.items()}
    if kind.lower() not in known or not (count or "1").isdigit() or not int(count or 1):
        raise ConfigError(f"--gpus {text}: give a number and a kind, such as 8xH100; kinds: {', '.join(GPUS)}")
    device, gpus = known[kind.lower()], int(count or 1)
    basis = (
        f"from published peaks, not measured: {device.name} with {device.flops / 1e12:.0f} TFLOP/s in bfloat16 and "
        f"{device.bandwidth / 1e12:.2f} TB/s; assumed shares of them: forward {ON_GPU.forward:g}, backward "
        f"{ON_GPU.backward:g}, decoding {ON_GPU.bandwidth:g} of the bandwidth"
    )
    ranks = ranks_of(cfg, gpus)
    host = None if host_gib is None else host_gib * 2**30
    return Where(FromPeaks(device, ON_GPU, basis), ranks, device.memory, gpus, host)


def on_this_machine(cfg: Config, file: Path, ranks: Mapping[str, int]) -> tuple[Where, list[int] | None]:
    """This machine, by what was measured on it or else roughly; and lengths of responses that were sampled then."""
    wanted = groups(cfg, ranks)
    found, absent, remarks = measured.read(file, list(wanted))
    rates, known = rough(cfg.engine.dtype, measure=bool(absent)), None
    memory = rates.device.memory
    if not found:
        basis = f"{rates.basis}; nothing was measured on this machine for this model: grm plan --measure"
        return Where(rates.named(basis), ranks, memory, report_seconds=finished_report(cfg)), None
    notes = [f"measured on this machine ({file})", *remarks, *(f"not measured: {name}" for name in absent)]
    both = measured.Measured(found, "; ".join(notes), shape_of(cfg.policy), rates)
    if (sampled := both.responses) and sampled[1] >= cfg.generation.max_new_tokens:
        known = sampled[0]
    return Where(both, ranks, memory, report_seconds=finished_report(cfg)), known


def finished_report(cfg: Config) -> float | None:
    """Seconds of a finished stage `report` of this machine, of this run or of one beside it."""
    for folder in (cfg.run_dir, *sorted(cfg.run.dir.glob("*"))):
        if (seconds := finished_seconds(folder / "report")) is not None:
            return seconds
    return None


def finished_responses(cfg: Config) -> list[int] | None:
    """Mean length of responses in this run's finished stage `preferences`, as a list of one; None where it was sampled
    from another policy or cut off elsewhere."""
    manifest = read_manifest(cfg.run_dir / "preferences")
    if manifest is None or "response_tokens" not in manifest["metrics"]:
        return None
    was = manifest["config"]
    same = was["generation"]["max_new_tokens"] == cfg.generation.max_new_tokens
    return (
        [round(manifest["metrics"]["response_tokens"])] if same and was["policy"]["path"] == cfg.policy.path else None
    )


def of_configuration(cfg: Config, lengths: Lengths, where: Where, price: float | None) -> Plan:
    """The stages of a run, or those of a study where the configuration describes one."""
    if cfg.study == Study():
        return make_plan(cfg, lengths, where, price)
    arms, policies = matrix(cfg)
    whole = expanded(cfg, arms)
    sizes = sizes_of(whole, lengths, where)
    stages: list[tuple[StagePlan, Sizes]] = [(plan_stage(name, sizes, where), sizes) for name in SHARED]
    at_once = parts_of(cfg.study.policies_at_once, where.gpus, len(os.sched_getaffinity(0)))
    kinds: dict[tuple, list] = {}  # policies against proxies of one size cost the same
    for policy in policies:
        kinds.setdefault((policy.condition.variant, policy.condition.layers, len(policy.arms)), []).append(policy)
    for alike in kinds.values():
        own = load_over(whole, policy_overrides(whole, alike[0]))
        of_policy = replace(sizes, cfg=own)
        stages += [(plan_stage(name, of_policy, where, len(alike), at_once), of_policy) for name in OWN]
    stages.append((plan_stage("report", sizes, where), sizes))
    plan = assemble(whole, stages, lengths, where, price)
    plan.notes.append(f"the matrix of the study: {len(arms)} reward models, {len(policies)} policies")
    return plan


def load_over(cfg: Config, overrides: list[str]) -> Config:
    """A configuration with overrides, checked again."""
    import tempfile

    import yaml

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(cfg.model_dump(mode="json"), file, sort_keys=False)
        file.flush()
        return load([file.name], overrides)
