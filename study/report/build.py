"""From a finished run, or from scores of other tools, to the report of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from bon.scores import read_pools
from core.artefacts import MANIFEST
from core.config import Config
from core.data.rows import PairRow
from core.files import read_json, read_table, write_json
from rm.variants import arm_rows
from study import checks as check
from study import files
from study import results as study_results
from study import reward_models as study_models
from study.design import Arm, Condition, Policy
from study.records import Results, Series
from study.report import page as study_page


def report(cfg: Config, arms: Sequence[Arm], policies: Sequence[Policy]) -> str:
    """Everything that follows from the stages; the line to print."""
    run, out = cfg.run_dir, cfg.run_dir / "study"
    study_models.score_second_gold(cfg)
    conditions: dict[Condition, list[str]] = {}
    for arm in arms:
        conditions.setdefault(arm.condition, []).append(arm.name)
    pools = read_pools(run / "bon", [arm.name for arm in arms], run / "study" / "gold2.parquet")
    pools = replace(pools, of_reference=cfg.one_reference)
    folders = {p.name: run / "policies" / p.name for p in policies}
    series = {p.name: files.read_policy(run, p, pools) for p in policies}
    plan = study_results.plan_of(cfg, cfg.bon.n_max or cfg.bon.samples, cfg.study)
    realised = realised_noise(cfg, [arm.name for arm in arms])
    results = study_results.results(
        pools, conditions, series, plan, baselines(arms),
        facts=study_models.facts(cfg, realised), rules=cfg.study.sweep,
    )  # fmt: skip
    results.about = study_models.about(cfg)
    files.write(out, results)
    manifests = {"rm": read_json(run / "rm" / MANIFEST)}
    manifests |= {p.name: read_json(run / "policies" / p.name / "ppo" / MANIFEST) for p in policies}
    checks = run_checks(cfg, results, series, manifests, realised, policy_seeds=cfg.study.ppo_seeds)
    write_json(out / "checks.json", files.plain(list(checks)))
    study_page.write(
        out, cfg.run.name, description(cfg, arms, policies), results, checks,
        accuracy=files.accuracies(run), seconds=files.seconds(run, list(folders)),
        config=yaml.safe_dump(cfg.study.model_dump(mode="json"), sort_keys=False),
    )  # fmt: skip
    return f"study: {'; '.join(study_page.summary(results))} -> {out / 'study.html'}"


def baselines(arms: Sequence[Arm]) -> dict[Condition, Condition]:
    """Each condition's baseline: the first variant with as many pairs, layers and as much noise."""
    first: dict[tuple, Condition] = {}
    for arm in arms:
        first.setdefault(arm.condition.cell, arm.condition)
    return {arm.condition: first[arm.condition.cell] for arm in arms}


def description(cfg: Config, arms: Sequence[Arm], policies: Sequence[Policy]) -> str:
    """What the study is, in two sentences."""
    cells = [arm.condition for arm in arms]
    variants = " against ".join(dict.fromkeys(c.variant for c in cells))
    sizes = ", ".join("all" if s is None else str(s) for s in dict.fromkeys(c.pairs for c in cells))
    noises = ", ".join(f"{n:.0%}" for n in dict.fromkeys(c.label_noise for c in cells))
    layers = ", ".join(str(n) for n in dict.fromkeys(c.layers for c in cells) if n)
    prompts = cfg.bon.prompts or "all"
    text = (
        f"Which is over-optimised, and how soon? {variants}{f' of {layers} layers' if layers else ''}, "
        f"{cfg.study.seeds} seeds each, on {sizes} pairs with {noises} of the labels wrong; best-of-n from pools of "
        f"{cfg.bon.samples} on {prompts} held-out prompts of {Path(cfg.policy.path).name}"
        f"{', fine-tuned' if cfg.sft else ''}, gold: {cfg.gold.kind}."
    )
    if policies:
        coefs = ", ".join(f"{c:g}" for c in dict.fromkeys(p.kl_coef for p in policies))
        alone = len({p.arms for p in policies if not p.rule})
        text += f" PPO against {alone} of them"
        if ensembles := dict.fromkeys(p.rule for p in policies if p.rule):
            text += f" and against ensembles of the seeds ({', '.join(map(str, ensembles))})"
        text += f": {len(policies)} policies, KL coefficient {coefs}."
    return text + remarks(cfg)


def remarks(cfg: Config) -> str:
    """What a reader must know of evaluation prompts from another file, and of pools that are sampled otherwise than
    policies; empty where there are none."""
    text = ""
    if cfg.data.eval_prompts:
        text = f" Evaluated on the prompts of {cfg.data.eval_prompts.name}, not of {cfg.data.prompts.name}."
    if cfg.one_reference:
        return text
    return (
        f"{text} Pools are sampled at temperature {cfg.bon.temperature or cfg.generation.temperature:g} with top-p "
        f"{cfg.bon.top_p:g}: the KL of best-of-n is that from this distribution, not from the one that PPO starts from."
    )


def realised_noise(cfg: Config, names: Sequence[str]) -> dict[str, float]:
    """Name of a reward model -> share of its training labels that were flipped for it."""
    pairs = read_table(cfg.run_dir / "preferences" / "pairs.parquet", PairRow)
    train, realised = [r for r in pairs if r["split"] == "rm_train"], {}
    before = {r["pair_id"]: r["flipped"] for r in train}
    for name in names:
        rows = arm_rows(train, cfg.rm.variants[name], cfg.run.seed)
        realised[name] = float(np.mean([r["flipped"] != before[r["pair_id"]] for r in rows]))
    return realised


def run_checks(
    cfg: Config, results: Results, series: Mapping[str, Series], manifests: Mapping[str, Mapping],
    realised: Mapping[str, float], *, policy_seeds: int,
) -> list[check.Check]:  # fmt: skip
    """The checks of a run or a study, whose stages lie in the run's folder.

    Args:
        manifests: of everything that was trained; `rm` is that of the stage.
        realised: of `realised_noise`.
        policy_seeds: policies a condition.
    """
    run, variants = cfg.run_dir, cfg.rm.variants
    prompts, pairs = (read_table(run / f) for f in ("prompts/prompts.parquet", "preferences/pairs.parquet"))
    trained = {r["prompt_id"] for r in pairs} | {
        r["prompt_id"] for r in prompts if r["split"] in ("rl_train", "calibration")
    }
    evaluated = {*results.pools.prompt_ids, *(r["prompt_id"] for one in series.values() for r in one.rows)}
    flipped = sum(bool(r["flipped"]) for r in pairs if r["split"] == "rm_val")
    trainings = manifests["rm"]["metrics"]["variants"]
    first = next(iter(variants.values())).pairs
    seen = {name: trainings[name]["pairs"] for name, variant in variants.items() if variant.pairs == first}
    samples = read_table(run / "bon" / "samples.parquet")
    last = [r for s in series.values() for r in s.rows if r["step"] == max(x["step"] for x in s.rows)]
    checks = [
        check.leakage(prompts, evaluated, trained),
        check.gold_untouched(manifests),
        check.same_scoring(results),
        *([check.one_reference(cfg)] if series else []),
        check.aligned(results),
        check.length_confound(results.pools, results),
        check.kl_estimates(series),
        check.sampler_agrees(series),
        check.bound_is_close(results),
        *check.enough(results, series, policy_seeds),
        check.label_noise({name: v.label_noise for name, v in variants.items()}, realised, flipped),
        check.gold_lineage(cfg.gold.kind, gold_base(cfg), cfg.rm.base.path),
        *check.golds_agree(results),
        *check.degenerate(samples, "pools"),
        check.equal_cost(seen, [cfg.rm.epochs_of(variants[name]) for name in seen]),
    ]
    return checks + (check.degenerate(last, "last step of the policies") if last else [])


def gold_base(cfg: Config) -> str | None:
    """The base model of a gold that is one of our checkpoints."""
    about = Path(cfg.gold.path) / "reward_model.json"
    return read_json(about).get("base") if cfg.gold.kind == "checkpoint" and about.is_file() else None
