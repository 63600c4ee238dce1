"""What a study found, from its pools and series: computed by `study.analysis.conditions` and `study.analysis.policies`, written as tables.

study/curves.csv       every curve with intervals and simultaneous bands
study/conditions.json  numbers, fits and verdict of each condition of best-of-n (conditions.csv: without the fits' rest)
study/policies.json    the same of each policy, and rules of when to stop
study/rms.json         each reward model: what it is, what it agrees with gold in, what optimising it did (rms.csv too)
study/members.csv      what the seeds of a condition have in common; sweep.csv: rules to combine them
study/foretelling.csv  which number of a reward model foretells what optimising it does; golds.csv: a second gold
study/kl.csv, tail.csv, per_prompt.parquet (and .csv), checks.json, figures/, study.html, study.md
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path

import numpy as np

from bon.pools import Pools, from_tables
from core.artefacts import read_json, read_manifest, read_table, write_json, write_table
from core.config import Config
from core.data.chat import stream_seed
from study import reward_models as study_models
from study.analysis import conditions as analysis
from study.analysis.agreement import agreement, foretelling, gold_by_proxy, members
from study.analysis.bootstrap import Interval, holm
from study.analysis.combiners import sweep
from study.analysis.conditions import Curve, Plan
from study.analysis.fits import Fit
from study.analysis.policies import series_curves, series_findings
from study.analysis.verdict import Verdict

SERIES_COLUMNS = {"kl_rb": "rb", "kl_k1": "k1", "kl_k3": "k3"}
"""Column of a KL -> its kind, in order of preference."""


@dataclass
class Series:
    """One RL run: rows of step, prompt_id, proxy, gold and a KL, one a sample."""

    rows: list[dict]
    proxy: str | None = None
    """Name of its reward model among the pools' proxies."""


@dataclass
class Results:
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


def plan_of(cfg: Config, n_max: int) -> Plan:
    return Plan(
        np.arange(1, n_max + 1), draws=cfg.eval.bootstrap, seed=stream_seed(cfg.run.seed, "study") % 2**63,
        ensembles=cfg.study.ensembles, temperatures=cfg.study.soft_temperatures,
    )  # fmt: skip


def results(
    pools: Pools,
    conditions: Mapping[str, Sequence[str]],
    series: Mapping[str, Series],
    plan: Plan,
    baseline: Mapping[str, str] | None = None,
    *,
    facts: Mapping[str, Mapping] | None = None,
    rules: Sequence[str] = (),
) -> Results:
    """Everything that pools and series say.

    Args:
        conditions: name -> the proxies that differ in their seed only.
        baseline: condition -> the condition that it is compared with, prompt by prompt and seed by seed.
        facts: proxy -> what is known of it beside its scores (`study.reward_models.facts`).
        rules: combiners of `study.analysis.combiners`.
    """
    out = Results(
        pools, analysis.condition_proxies(pools, conditions, plan), {k: list(v) for k, v in conditions.items()}
    )
    bases = analysis.baselines(pools, plan)
    gold, agreed = {}, {n: agreement(p, pools.gold) for n, p in pools.proxies.items()}
    for name, proxies in out.proxies.items():
        curves = analysis.bon_curves(pools, name, proxies, plan)
        gold[name] = curves["gold"]
        base = next((c for c in conditions if name.startswith(f"{c} x ")), name)  # of an ensemble: its members
        against = (baseline or {}).get(name) if base == name else base
        out.found[name] = analysis.findings(curves, bases[0], gold.get(against) if against != name else None)
        out.found[name] |= design(base)
        out.curves += curves.values()
        if name in conditions:
            out.curves += analysis.soft_curves(pools, name, proxies, plan)
            out.tail += [{"rm": name} | row for row in gold_by_proxy(pools, proxies)]
            out.rms += study_models.rows(name, conditions[name], curves["gold"], agreed, facts or {})
    out.curves += bases
    p_values = {n: f["difference_p"] for n, f in out.found.items() if f["difference_p"] is not None}
    for name, p in holm(p_values).items():
        out.found[name]["difference_p_holm"] = p
    out.foretelling = foretelling(out.rms, study_models.OUTCOMES, seed=plan.seed)
    out.sweep = sweep(pools, out.proxies, list(conditions), rules, plan)
    out.golds = study_models.second_gold(out, plan)
    for name in (c for c in conditions if len(conditions[c]) > 1):
        out.members.append({"rm": name, "members": len(conditions[name])} | members(out.proxies[name], pools.gold))
        out.curves.append(analysis.disagreement_curve(pools, name, out.proxies[name], plan))
    grid = plan.ns[np.unique(np.round(np.geomspace(1, len(plan.ns), 12)).astype(int) - 1)]
    out.kl = analysis.kl_table(pools, {k: out.proxies[k] for k in conditions}, grid)
    for name, one in series.items():
        curves = series_curves(name, with_kl(one.rows), plan, pools=pools, proxy=one.proxy)
        out.policies[name] = series_findings(curves)
        out.curves += curves.values()
    return out


def with_kl(rows: Sequence[Mapping]) -> list[dict]:
    """Rows with `kl` and `kl_kind`, from the best estimate that they have."""
    if "kl" in rows[0]:
        return list(rows)
    column = next(c for c in SERIES_COLUMNS if c in rows[0])
    return [{**row, "kl": row[column], "kl_kind": SERIES_COLUMNS[column]} for row in rows]


def write(out: Path, found: Results) -> None:
    """The tables."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "curves.csv", found.rows, analysis.COLUMNS)
    write_csv(out / "kl.csv", found.kl)
    write_csv(out / "tail.csv", found.tail)
    for name in ("members", "foretelling", "sweep", "golds"):
        write_csv(out / f"{name}.csv", getattr(found, name))
    write_json(out / "rms.json", plain(found.rms))
    write_csv(out / "rms.csv", [flat(row) for row in found.rms])
    write_json(out / "conditions.json", plain(found.found))
    write_json(out / "policies.json", plain(found.policies))
    write_csv(out / "conditions.csv", [{"rm": name} | flat(facts) for name, facts in found.found.items()])
    prompts = per_prompt(found)
    write_table(out / "per_prompt.parquet", prompts)
    write_csv(out / "per_prompt.csv", prompts)


def flat(facts: Mapping) -> dict:
    """One row of a CSV: each interval as three columns, alpha and beta of a fit, a verdict as its kind."""
    row = {}
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


def per_prompt(found: Results) -> list[dict]:
    """Gold gain of each prompt at powers of two, the mean over seeds."""
    rows = []
    for curve in found.curves:
        if curve.method != "bon" or curve.metric != "gold":
            continue
        for k in np.flatnonzero(np.log2(curve.x) % 1 == 0):
            values = curve.values[..., k].mean(axis=0).tolist()
            rows += [
                {"rm": curve.rm, "prompt_id": p, "n": int(curve.x[k]), "gold": v}
                for p, v in zip(found.pools.prompt_ids, values, strict=True)
            ]
    return rows


def write_csv(path: Path, rows: list[dict], columns: Sequence[str] | None = None) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def plain(value):
    """Dataclasses as dictionaries, for JSON; infinite numbers (the peak of a curve that never falls) as text."""
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def design(condition: str) -> dict:
    """method, pairs, layers (None: all, or not said) and label_noise of a condition, from a name such as
    `grm-384pairs-12layers-noise0.25` (`study.run.Arm.condition`)."""
    found = re.fullmatch(r"(.+?)(?:-(\d+)pairs)?(?:-(\d+)layers)?(?:-noise([\d.]+))?", condition)
    method, pairs, layers, noise = found.groups()
    return {
        "method": method, "pairs": int(pairs) if pairs else None, "layers": int(layers) if layers else None,
        "label_noise": float(noise or 0),
    }  # fmt: skip


def by_seed(names: Sequence[str]) -> dict[str, list[str]]:
    """Proxies whose names differ in `-seed3`, `_seed3` or `.s3` at their end only, as one condition."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"[-_.]s(?:eed)?[-_]?\d+$", "", name), []).append(name)
    return groups


def read_pools(run_dir: Path, names: Sequence[str]) -> Pools:
    """The pools of stage `bon` with the scores of these reward models, and of a second gold where it is there."""
    bon, second = run_dir / "bon", run_dir / "study" / "gold2.parquet"
    scores = {name: read_table(bon / "scores" / f"{name}.parquet") for name in ("gold", *names)}
    others = read_table(second) if second.is_file() else None
    return from_tables(read_table(bon / "samples.parquet"), scores.pop("gold"), scores, others)


def read_policy(folder: Path, proxy: str) -> Series:
    """The series that stage `eval` measured."""
    return Series(read_table(folder / "eval" / "rl_eval.parquet"), proxy)


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
