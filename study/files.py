"""Tables of a study: writing them, and reading those of the stages."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bon.pools import Pools
from bon.scores import optimised_rewards
from core.artefacts import read_manifest
from core.files import read_json, read_table, write_json, write_table
from study.analysis import conditions as analysis
from study.analysis.bootstrap import Interval
from study.analysis.fits import Fit
from study.analysis.verdict import Verdict
from study.design import Policy
from study.records import Results, Series


def write(out: Path, results: Results) -> None:
    """The tables."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "curves.csv", results.rows, analysis.COLUMNS)
    write_csv(out / "kl.csv", results.kl)
    write_csv(out / "tail.csv", results.tail)
    write_json(out / "about.json", results.about)
    for name in ("members", "prediction", "sweep", "golds", "ensemble_size"):
        write_csv(out / f"{name}.csv", getattr(results, name))
    write_json(out / "rms.json", plain(results.rms))
    write_csv(out / "rms.csv", [flat(row) for row in results.rms])
    write_json(out / "conditions.json", plain(results.findings))
    write_json(out / "policies.json", plain(results.policies))
    write_json(out / "pooled.json", plain({"pooled": results.pooled, "differences": results.policy_differences}))
    write_csv(out / "pooled.csv", [{"policies": name} | flat(facts) for name, facts in results.pooled.items()])
    write_csv(out / "policy_differences.csv", [flat(facts) for facts in results.policy_differences])
    write_csv(out / "conditions.csv", [{"rm": name} | flat(facts) for name, facts in results.findings.items()])
    prompts = per_prompt(results)
    if prompts:  # none where there are policies alone
        write_table(out / "per_prompt.parquet", prompts)
    write_csv(out / "per_prompt.csv", prompts)


def flat(facts: Mapping) -> dict:
    """One row of a CSV: each interval as three columns, alpha and beta of a fit, a verdict as its kind."""
    row: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Fit):
            row |= flat({"alpha": value.alpha, "beta": value.beta})
        elif isinstance(value, Interval):
            row |= {key: value.mean, f"{key}_lo": value.lo, f"{key}_hi": value.hi}
        elif isinstance(value, Verdict):
            row[key] = value.kind
        elif value is None or isinstance(value, int | float | str):
            row[key] = value
    return row


def per_prompt(results: Results) -> list[dict]:
    """Gold gain of each prompt at powers of two, the mean over seeds."""
    rows = []
    for curve in results.curves:
        if curve.method != "bon" or curve.metric != "gold":
            continue
        for k in np.flatnonzero(np.log2(curve.x) % 1 == 0):
            values = curve.values[..., k].mean(axis=0).tolist()
            rows += [
                {"rm": curve.rm, "prompt_id": p, "n": int(curve.x[k]), "gold": v}
                for p, v in zip(results.pools.prompt_ids, values, strict=True)
            ]
    return rows


def write_csv(path: Path, rows: list[dict], columns: Sequence[str] | None = None) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def plain(value):
    """Dataclasses as dictionaries, for JSON; infinite numbers (the peak of a curve that never falls) as text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def read_policy(run: Path, policy: Policy, pools: Pools) -> Series:
    """The series that stage `eval` measured.

    Args:
        run: the folder of the study's run.
        pools: with the rewards of all its reward models.
    """
    rows = read_table(run / "policies" / policy.name / "eval" / "rl_eval.parquet")
    combined = None
    if policy.rule:
        combined = optimised_rewards(run / "rm", pools, [arm.name for arm in policy.arms], policy.rule)
    return Series(rows, policy.proxy, policy.condition, policy.kl_coef, policy.seed, combined)


def accuracies(run_dir: Path) -> dict[str, float]:
    """Held-out accuracy of each reward model against clean labels."""
    metrics = (read_manifest(run_dir / "rm") or {}).get("metrics", {})
    return {name: m["accuracy_gold"]["mean"] for name, m in metrics.get("variants", {}).items()}


def seconds(run_dir: Path, policies: Sequence[str]) -> list[tuple[str, float]]:
    """Stage -> seconds it took, of the shared stages and of all policies together."""
    stages = [(s, read_json(run_dir / s / "manifest.json")["seconds"]) for s in ("prompts", "preferences", "rm", "bon")]
    for stage in ("ppo", "eval"):
        times = [read_json(run_dir / "policies" / p / stage / "manifest.json")["seconds"] for p in policies]
        stages += [(stage, sum(times))] if times else []
    return stages
