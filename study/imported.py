"""The report of scores and RL series of other tools: no model is run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bon.pools import Pools
from core.config import Config
from core.errors import ConfigError
from core.files import write_json
from study import checks as check
from study import files
from study import results as study_results
from study.design import Condition
from study.layouts.grm_repository import Chosen
from study.other_tools import SEED, by_seed, condition_of_run, read_scores, read_series, without_seed
from study.records import Results, Series
from study.report import page as study_page

COEFFICIENT = re.compile(r"[-_.]kl[-_]?(\d*\.?\d+(?:e-?\d+)?)(?=$|[-_])")
"""A KL coefficient in the name of a run."""
EVERY_N = 256
"""Pools of more samples have curves at this many values of n, evenly in log n: 12,600 values would say no more."""


def imported(cfg: Config, scores: Path | None, series: Path | None, out: Path, baseline: str | None = None) -> str:
    """Tables, figures and the page in `out`; the line to print.

    Args:
        scores: of `study.other_tools.read_scores`.
        series: of `study.other_tools.read_series`; at least one of the two.
        baseline: what the others are compared with (`baseline_of`).
    """
    found = read_scores(scores) if scores else None
    pools = found if isinstance(found, Pools) else no_pools()
    conditions = by_seed(list(pools.proxies))
    rows = read_series(series) if series else []
    runs = series_of([*rows, *(found.rows if isinstance(found, Chosen) else [])], conditions)
    known = list(dict.fromkeys([*conditions, *(one.condition for one in runs.values() if one.condition)]))
    base = baseline_of(known, baseline, cfg.study.variants)
    against = {} if base is None else dict.fromkeys(known, base)
    plan = study_results.plan_of(cfg, 1, cfg.study)
    if conditions:
        n_max = cfg.bon.n_max if cfg.bon.n_max and cfg.bon.n_max <= pools.size else pools.size
        plan = replace(plan, ns=grid(n_max))
        ordered = {c: conditions[c] for c in sorted(conditions, key=lambda c: c != base)}
        results = study_results.results(pools, ordered, runs, plan, against, rules=cfg.study.sweep)
    else:
        results = Results(pools, {}, {}, {})
        study_results.add_policies(results, runs, plan, against)
    files.write(out, results)
    checks = _checks(pools, results, runs)
    write_json(out / "checks.json", files.plain(checks))
    study_page.write(out, (scores or series or out).stem, _description(scores, series, found, runs), results, checks)
    return f"study: {'; '.join(study_page.summary(results))} -> {out / 'study.html'}"


def no_pools() -> Pools:
    return Pools((), np.zeros((0, 1)), {})


def grid(n_max: int) -> np.ndarray:
    """The n of curves: all of them, or EVERY_N of them with the powers of 2."""
    if n_max <= EVERY_N:
        return np.arange(1, n_max + 1)
    even = np.round(np.geomspace(1, n_max, EVERY_N)).astype(int)
    return np.unique(np.concatenate([even, 2 ** np.arange(int(np.log2(n_max)) + 1)]))


def series_of(rows: Iterable[dict], conditions: Iterable[Condition]) -> dict[str, Series]:
    """Runs by their names, each with its condition, KL coefficient and seed.

    Runs whose names differ in a seed only (`bt-seed3`), or that a column `seed` tells apart, are seeds of one
    condition. So are those of one KL coefficient, which a column `kl_coef` or the name (`bt-seed3-kl0.1`) has.
    """
    known, runs = list(conditions), dict[str, Series]()
    for row in rows:
        name = str(row["run"])
        if row.get("seed") not in (None, "") and not SEED.search(name):
            name = f"{name}-seed{int(float(row['seed']))}"
        runs.setdefault(name, Series([])).rows.append(row)
    for name, one in runs.items():
        seed, coefficient = SEED.findall(name), COEFFICIENT.search(name)
        bare = COEFFICIENT.sub("", without_seed(name)) or name
        like = condition_of_run(bare, known)
        one.condition = like if like is not None and like.name == bare else Condition(bare)
        one.seed = int(re.sub(r"\D", "", seed[-1])) if seed else None
        given = one.rows[0].get("kl_coef")
        one.kl_coef = float(given) if given not in (None, "") else float(coefficient[1]) if coefficient else None
    return runs


def baseline_of(conditions: Sequence[Condition], asked: str | None, variants: Sequence[str]) -> Condition | None:
    """What the others are compared with: the one that was asked for, else the first of `study.variants` that there is,
    else the first one; ConfigError for a name that there is not."""
    names = {condition.name: condition for condition in conditions}
    if asked is not None and asked not in names:
        raise ConfigError(f"--baseline {asked}: no such condition; there are {', '.join(names)}")
    wanted = [asked] if asked else [v for v in variants if v in names]
    return names[wanted[0]] if wanted else next(iter(conditions), None)


def _checks(pools: Pools, results: Results, runs: Mapping[str, Series]) -> list[check.Check]:
    """Those that need no more than scores."""
    policies = [f for f in runs.values() if f.seed is not None]
    groups = [(one.condition, one.kl_coef) for one in policies]
    seeds = min((groups.count(group) for group in groups), default=1)
    if not results.conditions:
        return [check.kl_estimates(runs)]
    return [
        check.aligned(results), check.length_confound(pools, results), check.bound_is_close(results),
        *check.enough(results, runs, seeds), check.kl_estimates(runs), *check.golds_agree(results),
    ]  # fmt: skip


def _description(
    scores: Path | None, series: Path | None, found: Pools | Chosen | None, runs: Mapping[str, Series]
) -> str:
    parts = []
    if isinstance(found, Pools):
        size = f"{len(found.prompt_ids)} prompts, pools of {found.size}"
        parts.append(f"Scores of {scores}: {len(found.proxies)} proxies, {size}.")
    if isinstance(found, Chosen):
        parts.append(
            f"Scores of {scores}: gold covers only what a proxy chose, so a curve has the best of the first n samples, "
            f"one draw for each n, and steps are n ({found.about}). Gains are over the first sample, in standard "
            "deviations over prompts of it."
        )
    if series:
        parts.append(f"RL series of {series}: {len(runs)} runs.")
        if not isinstance(found, Pools):
            parts.append("Without pools, gains are over the first step, in standard deviations over its prompts.")
    return " ".join(parts)
