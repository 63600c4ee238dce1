"""`grm study`: reward models by method, seed, data size, model size and label noise; best-of-n for all, PPO for some.

The matrix of `study` in the configuration becomes one run whose `rm.variants` are all its arms, so that prompts, pairs,
pools and gold scores exist once, and a run below `policies/` for each PPO arm, which links to them. Everything is run
by the stages, which resume and skip what is up to date.

    grm study --config F              run what is missing, then analyse
    grm study --config F --dry-run    the plan and its cost
    grm study --config F --commands   a command a line: the first ones in order, then, from the blank line on, the PPO
                                      arms, in any order and in parallel (the tasks of a Slurm array, one GPU each)
    grm study --scores PATH --series PATH --out FOLDER   analyse scores and RL series of other tools, or one of the
                                      two: no model is run
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import yaml

from core.artefacts import read_manifest
from core.config import Config
from core.config.load import load
from core.errors import ArtefactError, ConfigError
from core.files import read_table
from core.locks import writing
from pipelines import launch, stages
from pipelines.inputs import check
from study.at_once import Training, run_at_once, shares
from study.design import Arm, Policy
from study.matrix import OWN, expanded, plan, policy_overrides, shared_stages


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="grm study", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="config values, laid over the files")
    parser.add_argument("--config", "-c", action="append", help="YAML file; repeat to lay files over each other")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost")
    parser.add_argument("--commands", action="store_true", help="print the commands, one a line, for a scheduler")
    parser.add_argument("--scores", type=Path, help="pools with scores of other tools (layouts: docs/study.md)")
    parser.add_argument("--series", type=Path, help="RL runs of other tools, one row per sample")
    parser.add_argument("--baseline", metavar="NAME", help="what other methods of --scores and --series are compared "
                        "with (default: the first of study.variants that there is, else the first one)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for what `--scores` and `--series` show")
    options = parser.parse_intermixed_args(argv)
    cfg = load(options.config or ["configs/study.yaml"], options.overrides)
    if source := options.scores or options.series:
        from study.imported import imported

        out = options.out or Path("runs", source.stem)
        print(imported(cfg, options.scores, options.series, out, options.baseline))
        return 0
    if unused := [name for name in ("out", "baseline") if getattr(options, name)]:
        raise ConfigError(f"--{unused[0]} is for scores of other tools: give --scores or --series with it")
    given = cfg
    arms, policies = plan(cfg)
    cfg = expanded(cfg, arms)
    if options.dry_run:
        print("\n".join(describe(cfg, arms, policies)))
        return 0
    file = write_config(cfg, "study.yaml")
    link(cfg, policies)
    if options.commands:
        print("\n".join(commands(file, policies, cfg, write_config(given, "matrix.yaml"))))
        return 0
    return run(cfg, file, arms, policies)


def write_config(cfg: Config, name: str) -> Path:
    """A configuration as a file in the run's folder: `study.yaml` is the expanded one, which the stages and other
    machines read, `matrix.yaml` the one that was given, from which `grm study` makes the same plan."""
    file = cfg.run_dir / name
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{name}.{os.getpid()}.tmp")  # another `grm study` may write and read it meanwhile
    temporary.write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False))
    temporary.replace(file)
    return file


def link(cfg: Config, policies: list[Policy]) -> None:
    """Each policy's run sees the shared stages as its own; links are relative, so a study can be moved."""
    for policy in policies:
        folder = cfg.run_dir / "policies" / policy.name
        folder.mkdir(parents=True, exist_ok=True)
        for stage in shared_stages(cfg):
            if not (folder / stage).is_symlink():
                with suppress(FileExistsError):  # by another `grm study`
                    (folder / stage).symlink_to(Path("..", "..", stage), target_is_directory=True)


def commands(file: Path, policies: list[Policy], cfg: Config, given: Path) -> list[str]:
    """Shell commands: the shared stages, a blank line, one line a policy, a blank line, the analysis."""
    grm = lambda *words: shlex.join(["grm", *map(str, words)])  # noqa: E731
    lines = [grm(stage, "--config", file) for stage in shared_stages(cfg)]
    arms = [
        " && ".join(grm(stage, "--config", file, *policy_overrides(cfg, policy)) for stage in OWN)
        for policy in policies
    ]
    return [*lines, "", *arms, "", grm("study", "--config", given)]


def run(cfg: Config, file: Path, arms: list[Arm], policies: list[Policy]) -> int:
    config = ["--config", str(file)]
    for stage in shared_stages(cfg):
        if status := launch.bring_up_to_date(stage, cfg, [stage, *config]):
            return status
        if stage == "preferences":
            refuse_leaks(cfg)
    own = {policy: policy_overrides(cfg, policy) for policy in policies}
    settings = {policy: load([file], extra) for policy, extra in own.items()}
    parts = shares(cfg.study.policies_at_once)
    if len(parts) > 1:
        trainings = [
            Training(policy.name, settings[policy].run_dir, [[stage, *config, *own[policy]] for stage in OWN])
            for policy in policies
            if any(stages.staleness(stage, settings[policy]) != [] for stage in OWN)
        ]
        if trainings and (status := run_at_once(trainings, parts)):
            return status
    for policy, stage in product(policies, OWN):  # trained or not, each says that it is up to date
        if status := launch.bring_up_to_date(stage, settings[policy], [stage, *config, *own[policy]]):
            return status
    todo = [(stage, cfg) for stage in shared_stages(cfg)] + [(s, settings[p]) for p, s in product(policies, OWN)]
    for stage, used in todo:
        check(stage, used.run_dir / stage, f"the study needs {stage!r}, and", weights=False)
    from study.report.build import report

    with writing(cfg.run_dir, "study"):
        print(report(cfg, arms, policies), file=sys.stderr)
    return 0


def refuse_leaks(cfg: Config) -> None:
    """ConfigError when a preference pair has a prompt on which the study measures."""
    evaluated = {
        r["prompt_id"] for r in read_table(cfg.run_dir / "prompts" / "prompts.parquet") if r["split"] == "eval"
    }
    pairs = read_table(cfg.run_dir / "preferences" / "pairs.parquet")
    if shared := sorted({row["prompt_id"] for row in pairs} & evaluated):
        raise ConfigError(
            f"the study would train on {len(shared)} of its {len(evaluated)} evaluation prompts (first {shared[0]}): "
            "leave them out of preferences.sources, or give preferences.decontaminate a file of the evaluation prompts"
        )


def describe(cfg: Config, arms: list[Arm], policies: list[Policy]) -> list[str]:
    """What the study does and how much of it, from the configuration and what is done already."""
    conditions = list(dict.fromkeys(arm.condition.name for arm in arms))
    prompts = cfg.bon.prompts or "all evaluation"
    steps = len(policies) * cfg.ppo.steps
    epochs = sorted({cfg.rm.epochs_of(cfg.rm.variants[arm.name]) for arm in arms})
    lines = [
        f"study {cfg.run_dir}: {len(conditions)} conditions x {cfg.study.seeds} seeds = {len(arms)} reward models, "
        f"{len(policies)} policies",
        f"  rm        {len(arms)} trainings of {', '.join(map(str, epochs))} epoch(s): {', '.join(conditions)}",
        f"  bon       {cfg.bon.samples} samples on {prompts} prompts, scored by {len(arms)} reward models and gold",
        f"  ppo       {steps} steps of {cfg.ppo.rollouts} rollouts: {', '.join(p.name for p in policies) or 'none'}",
        f"  eval      {len(policies)} times 1 + {-(-cfg.ppo.steps // cfg.ppo.checkpoint_every)} checkpoints"
        + (f", and more wherever KL moves by {kl:g} nats" if (kl := cfg.ppo.checkpoint_kl) else ""),
    ]
    for stage in shared_stages(cfg):
        manifest = read_manifest(cfg.run_dir / stage)
        lines.append(f"  {stage}: " + ("not run" if manifest is None else f"ran, {manifest['seconds']:.0f} s"))
    ran = []
    for policy in policies:
        try:
            manifest = read_manifest(cfg.run_dir / "policies" / policy.name / "ppo")
        except ArtefactError:
            manifest = None
        ran += [manifest["seconds"]] if manifest else []
    if ran:
        left = (len(policies) - len(ran)) * sum(ran) / len(ran)
        lines.append(f"  policies: {len(ran)} ran, {left / 60:.0f} minutes of PPO left at their speed")
    return lines
