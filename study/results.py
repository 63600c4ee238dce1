"""What a study found, from its pools and series: computed by `study.analysis`.

study/curves.csv       every curve with intervals and simultaneous bands
study/conditions.json  numbers, fits and verdict of each condition of best-of-n (conditions.csv: without the fits' rest)
study/policies.json    the same of each policy, and rules of when to stop
study/rms.json         each reward model: what it is, what it agrees with gold in, what optimising it did (rms.csv too)
study/members.csv      what the seeds of a condition have in common; sweep.csv: rules to combine them
study/foretelling.csv  which number of a reward model foretells what optimising it does; golds.csv: a second gold
study/kl.csv, tail.csv, per_prompt.parquet (and .csv), checks.json, figures/, study.html, study.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from bon.pools import Pools
from core.config import Config
from core.data.streams import stream_seed
from study import reward_models as study_models
from study.analysis import conditions as analysis
from study.analysis.agreement import agreement, foretelling, gold_by_proxy, members
from study.analysis.bootstrap import holm
from study.analysis.combiners import sweep
from study.analysis.conditions import Plan
from study.analysis.policies import series_curves, series_findings
from study.records import Results, Series

SERIES_COLUMNS = {"kl_rb": "rb", "kl_k1": "k1", "kl_k3": "k3"}
"""Column of a KL -> its kind, in order of preference."""


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


def design(condition: str) -> dict:
    """method, pairs, layers (None: all, or not said) and label_noise of a condition, from a name such as
    `grm-384pairs-12layers-noise0.25` (`study.matrix.Arm.condition`)."""
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
