"""What a study found, from its pools and series: computed by `study.analysis`.

study/curves.csv       every curve with intervals and simultaneous bands
study/conditions.json  numbers, fits and verdict of each condition of best-of-n (conditions.csv: without the fits' rest)
study/policies.json    the same of each policy, and rules of when to stop
study/pooled.json      the policies of a condition and KL coefficient together (pooled.csv); policy_differences.csv: one
                       condition less another at equal KL, at equal step, and at the last step
study/rms.json         each reward model: what it is, what it agrees with gold in, what optimising it did (rms.csv too)
study/members.csv      what the seeds of a condition have in common; sweep.csv: rules to combine them, and
                       ensemble_size.csv: how many of them
study/prediction.csv  which number of a reward model predicts what optimising it does; golds.csv: a second gold
study/kl.csv, tail.csv, per_prompt.parquet (and .csv), checks.json, figures/, study.html, study.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from bon.pools import Pools
from core.config import Config, Study
from core.data.streams import stream_seed
from core.errors import ArtefactError
from study import reward_models as study_models
from study.analysis import conditions as analysis
from study.analysis.agreement import agreement, gold_by_proxy, members, prediction
from study.analysis.bootstrap import holm
from study.analysis.combiners import by_members, sweep
from study.analysis.conditions import Curve, Plan
from study.analysis.policies import curves_of, measure, series_findings
from study.analysis.policy_differences import compare, comparisons
from study.analysis.pooled import grouped, pooled_curves, pooled_findings
from study.design import Condition
from study.records import Results, Series

SERIES_COLUMNS = {"kl_rb": "rb", "kl_k1": "k1", "kl_k3": "k3"}
"""Column of a KL -> its kind, in order of preference."""


def plan_of(cfg: Config, n_max: int, study: Study | None = None) -> Plan:
    """How a run is analysed; with `study`, ensembles of the seeds and soft best-of-n too."""
    return Plan(
        np.arange(1, n_max + 1), draws=cfg.eval.bootstrap, seed=stream_seed(cfg.run.seed, "study") % 2**63,
        ensembles=study.ensembles if study else (), temperatures=study.soft_temperatures if study else (),
    )  # fmt: skip


def results(
    pools: Pools,
    conditions: Mapping[Condition, Sequence[str]],
    series: Mapping[str, Series],
    plan: Plan,
    baseline: Mapping[Condition, Condition] | None = None,
    *,
    facts: Mapping[str, Mapping] | None = None,
    rules: Sequence[str] = (),
) -> Results:
    """Everything that pools and series say.

    Args:
        conditions: the proxies that differ in their seed only.
        series: name of a policy -> its evaluation along training.
        baseline: the condition that one is compared with, prompt by prompt and seed by seed.
        facts: proxy -> what is known of it beside its scores (`study.reward_models.facts`).
        rules: combiners of `study.analysis.combiners`.

    Raises:
        ArtefactError: two conditions or ensembles of one name.
    """
    proxies = analysis.condition_proxies(pools, conditions, plan)
    if twice := [name for name, n in Counter(condition.name for condition in proxies).items() if n > 1]:
        raise ArtefactError(f"two conditions have the name {', '.join(twice)}: rename the variant of one of them")
    out = Results(
        pools,
        proxies={c.name: p for c, p in proxies.items()},
        conditions={c.name: list(names) for c, names in conditions.items()},
        designs={c.name: c for c in proxies},
    )
    bases = analysis.baselines(pools, plan)
    gold: dict[Condition, Curve] = {}
    agreed = {n: agreement(p, pools.gold) for n, p in pools.proxies.items()}
    for condition, stacked in proxies.items():
        name, curves = condition.name, analysis.bon_curves(pools, condition.name, stacked, plan)
        gold[condition] = curves["gold"]
        against = condition.members if condition.rule else (baseline or {}).get(condition)
        other = gold.get(against) if against is not None and against != condition else None
        found = analysis.findings(curves, bases[0], other) | _design(condition)
        out.findings[name] = found | {"against": against.name if other is not None and against else None}
        out.curves += curves.values()
        if condition in conditions:
            out.curves += analysis.soft_curves(pools, name, stacked, plan)
            out.tail += [{"rm": name} | row for row in gold_by_proxy(pools, stacked)]
            out.rms += study_models.rows(name, conditions[condition], curves["gold"], agreed, facts or {})
    out.curves += bases
    p_values = {n: f["difference_p"] for n, f in out.findings.items() if f["difference_p"] is not None}
    for name, p in holm(p_values).items():
        out.findings[name]["difference_p_holm"] = p
    out.prediction = prediction(out.rms, study_models.OUTCOMES, seed=plan.seed)
    out.sweep = sweep(pools, out.proxies, list(out.conditions), rules, plan)
    out.ensemble_size = by_members(pools, out.proxies, list(out.conditions), plan)
    out.golds = study_models.second_gold(out, plan)
    for name in (c for c, names in out.conditions.items() if len(names) > 1):
        out.members.append({"rm": name, "members": len(out.conditions[name])} | members(out.proxies[name], pools.gold))
        out.curves.append(analysis.disagreement_curve(pools, name, out.proxies[name], plan))
    grid = plan.ns[np.unique(np.round(np.geomspace(1, len(plan.ns), 12)).astype(int) - 1)]
    out.kl = analysis.kl_table(pools, {k: out.proxies[k] for k in out.conditions}, grid)
    add_policies(out, series, plan, baseline or {})
    return out


def add_policies(
    out: Results, series: Mapping[str, Series], plan: Plan, baseline: Mapping[Condition, Condition]
) -> None:
    """Each policy by itself, the policies of a condition and KL coefficient together, and these compared."""
    runs = []
    for name, one in series.items():
        run = measure(name, with_kl(one.rows), pools=one.pools(out.pools), proxy=one.proxy)
        curves = curves_of(run, plan)
        if one.condition:
            out.designs.setdefault(one.condition.name, one.condition)
        out.policies[name] = series_findings(curves) | {
            "condition": one.condition.name if one.condition else None, "rm": one.proxy, "kl_coef": one.kl_coef,
            "rule": one.condition.rule if one.condition else None, "seed": one.seed,
        }  # fmt: skip
        out.curves += curves.values()
        runs.append((run, one.condition, one.kl_coef, one.seed))
    groups = grouped(runs)
    for group in groups:
        if curves := pooled_curves(group, plan):
            own = [out.policies[run.name]["verdict"] for run in group.runs]
            found = pooled_findings(group, curves, own)
            out.pooled[group.name] = found | {"condition": group.condition.name} | _design(group.condition)
            out.curves += curves.values() if len(group.runs) > 1 else ()
    for ours, theirs in comparisons(groups, baseline):
        facts, curve = compare(ours, theirs, plan)
        if curve is not None:
            out.policy_differences.append(facts)
            out.curves.append(curve)
    p_values = {str(k): facts["p"] for k, facts in enumerate(out.policy_differences)}
    for k, p in holm(p_values).items():
        out.policy_differences[int(k)]["p_holm"] = p


def _design(condition: Condition) -> dict[str, str | int | float | None]:
    keys = ("variant", "pairs", "layers", "label_noise", "rule")
    return {key: getattr(condition, key) for key in keys} | {"members": condition.members.name}


def with_kl(rows: Sequence[Mapping]) -> list[dict]:
    """Rows with `kl` and `kl_kind`, from the best estimate that they have."""
    if "kl" in rows[0]:
        return [dict(row) for row in rows]
    column = next(c for c in SERIES_COLUMNS if c in rows[0])
    return [{**row, "kl": row[column], "kl_kind": SERIES_COLUMNS[column]} for row in rows]
