"""From a finished run, or from scores of other tools, to the report of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from core.artefacts import read_manifest
from core.config import Config
from core.files import read_json, read_table, write_json
from rm.variants import arm_rows
from study import checks as check
from study import files
from study import results as study_results
from study import reward_models as study_models
from study.matrix import Arm, Policy
from study.other_tools import read_scores, read_series
from study.records import Results, Series
from study.report import page as study_page


def report(cfg: Config, arms: Sequence[Arm], policies: Sequence[Policy]) -> str:
    """Everything that follows from the stages; the line to print."""
    run, out = cfg.run_dir, cfg.run_dir / "study"
    study_models.score_second_gold(cfg)
    conditions: dict[str, list[str]] = {}
    for arm in arms:
        conditions.setdefault(arm.condition, []).append(arm.name)
    pools = files.read_pools(run, [arm.name for arm in arms])
    folders = {p.name: run / "policies" / p.name for p in policies}
    series = {p.name: files.read_policy(folders[p.name], p.arm.name) for p in policies}
    plan = study_results.plan_of(cfg, cfg.bon.n_max or cfg.bon.samples)
    realised = realised_noise(cfg, arms)
    found = study_results.results(
        pools, conditions, series, plan, baselines(arms),
        facts=study_models.facts(cfg, realised), rules=cfg.study.sweep,
    )  # fmt: skip
    files.write(out, found)
    checks = run_checks(cfg, arms, policies, found, series, realised)
    write_json(out / "checks.json", files.plain(list(checks)))
    study_page.write(
        out, cfg.run.name, asked(cfg, arms, policies), found, checks,
        accuracy=files.accuracies(run), seconds=files.seconds(run, list(folders)),
        config=yaml.safe_dump(cfg.study.model_dump(mode="json"), sort_keys=False),
    )  # fmt: skip
    return f"study: {'; '.join(study_page.summary(found))} -> {out / 'study.html'}"


def baselines(arms: Sequence[Arm]) -> dict[str, str]:
    """Condition -> that of the first method with as many pairs, layers and as much noise."""
    first: dict[tuple, str] = {}
    for arm in arms:
        first.setdefault((arm.pairs, arm.layers, arm.label_noise), arm.condition)
    return {arm.condition: first[arm.pairs, arm.layers, arm.label_noise] for arm in arms}


def asked(cfg: Config, arms: Sequence[Arm], policies: Sequence[Policy]) -> str:
    """What the study is, in two sentences."""
    methods = " against ".join(dict.fromkeys(a.method for a in arms))
    sizes = ", ".join("all" if s is None else str(s) for s in dict.fromkeys(a.pairs for a in arms))
    noises = ", ".join(f"{n:.0%}" for n in dict.fromkeys(a.label_noise for a in arms))
    layers = ", ".join(str(n) for n in dict.fromkeys(a.layers for a in arms) if n)
    prompts = cfg.bon.prompts or "all"
    text = (
        f"Which is over-optimised, and how soon? {methods}{f' of {layers} layers' if layers else ''}, "
        f"{cfg.study.seeds} seeds each, on {sizes} pairs with {noises} of the labels wrong; best-of-n from pools of "
        f"{cfg.bon.samples} on {prompts} held-out prompts of {Path(cfg.policy.path).name}, gold: {cfg.gold.kind}."
    )
    if policies:
        coefs = ", ".join(f"{c:g}" for c in dict.fromkeys(p.kl_coef for p in policies))
        text += f" PPO against {len(policies)} of them, KL coefficient {coefs}."
    return text


def realised_noise(cfg: Config, arms: Sequence[Arm]) -> dict[str, float]:
    """Arm -> share of its training labels that were flipped for it."""
    pairs = read_table(cfg.run_dir / "preferences" / "pairs.parquet")
    train, realised = [r for r in pairs if r["split"] == "rm_train"], {}
    before = {r["pair_id"]: r["flipped"] for r in train}
    for arm in arms:
        rows = arm_rows(train, cfg.rm.variants[arm.name], cfg.run.seed)
        realised[arm.name] = float(np.mean([r["flipped"] != before[r["pair_id"]] for r in rows]))
    return realised


def run_checks(
    cfg: Config, arms: Sequence[Arm], policies: Sequence[Policy], found: Results, series: dict[str, Series],
    realised: dict[str, float],
) -> list[check.Check]:  # fmt: skip
    run = cfg.run_dir
    prompts, pairs = (read_table(run / f) for f in ("prompts/prompts.parquet", "preferences/pairs.parquet"))
    trained = {r["prompt_id"] for r in pairs} | {
        r["prompt_id"] for r in prompts if r["split"] in ("rl_train", "calibration")
    }
    manifests = {"rm": read_manifest(run / "rm")}
    manifests |= {p.name: read_manifest(run / "policies" / p.name / "ppo") for p in policies}
    flipped = sum(bool(r["flipped"]) for r in pairs if r["split"] == "rm_val")
    sizes = {a.name: a.pairs for a in arms}
    trainings = manifests["rm"]["metrics"]["variants"]
    seen = {a.name: trainings[a.name]["pairs"] for a in arms if sizes[a.name] == arms[0].pairs}
    samples = read_table(run / "bon" / "samples.parquet")
    last = [r for s in series.values() for r in s.rows if r["step"] == max(x["step"] for x in s.rows)]
    checks = [
        check.leakage(prompts, found.pools.prompt_ids, trained),
        check.gold_untouched(manifests),
        check.same_scoring(found),
        check.aligned(found),
        check.length_confound(found.pools, found),
        check.kl_estimates(series),
        check.bound_is_close(found),
        *check.enough(found, series, cfg.study.ppo_seeds),
        check.label_noise({a.name: a.label_noise for a in arms}, realised, flipped),
        check.gold_lineage(cfg.gold.kind, gold_base(cfg), cfg.rm.base.path),
        *check.golds_agree(found),
        *check.degenerate(samples, "pools"),
        check.equal_cost(seen),
    ]
    return checks + (check.degenerate(last, "last step of the policies") if last else [])


def gold_base(cfg: Config) -> str | None:
    """The base model of a gold that is one of our checkpoints."""
    about = Path(cfg.gold.path) / "reward_model.json"
    return read_json(about).get("base") if cfg.gold.kind == "checkpoint" and about.is_file() else None


def imported(cfg: Config, scores: Path, series: Path | None, out: Path) -> str:
    """The report of scores of other tools; checks that need the run are not made."""
    pools = read_scores(scores)
    runs: dict[str, Series] = {}
    for row in read_series(series) if series else []:
        runs.setdefault(str(row["run"]), Series([])).rows.append(row)
    plan = study_results.plan_of(cfg, cfg.bon.n_max if cfg.bon.n_max and cfg.bon.n_max <= pools.size else pools.size)
    conditions = study_results.by_seed(list(pools.proxies))
    found = study_results.results(pools, conditions, runs, plan, rules=cfg.study.sweep)
    files.write(out, found)
    checks = [
        check.aligned(found), check.length_confound(pools, found), check.bound_is_close(found),
        *check.enough(found, runs, 1), check.kl_estimates(runs), *check.golds_agree(found),
    ]  # fmt: skip
    write_json(out / "checks.json", files.plain(checks))
    what = f"Scores of {scores}: {len(pools.proxies)} proxies, {len(pools.prompt_ids)} prompts, pools of {pools.size}."
    study_page.write(out, scores.stem, what, found, checks)
    return f"study: {'; '.join(study_page.summary(found))} -> {out / 'study.html'}"
