"""What a study found: curves of every condition over its seeds, ensembles of them, and policies.

A condition is what the seeds of a reward model have in common. Intervals are from a bootstrap crossed over seeds and
prompts: neither is a sample of the other, and seeds x prompts are not independent draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bon.estimators import best_of_n, kl_bound, oracle
from pipelines.artefacts import join, read_manifest, read_table, write_json
from pipelines.config import Config
from pipelines.curves import matrix, read_curves, write_curves
from pipelines.data import stream_seed
from pipelines.study import Arm, Policy
from rm import combine


def analyse(cfg: Config, arms: Sequence[Arm], policies: Sequence[Policy]) -> str:
    """Write `study/curves.csv`, `study/conditions.json` and `study/study.md`; the line to print."""
    bon, out = cfg.run_dir / "bon", cfg.run_dir / "study"
    samples = read_table(bon / "samples.parquet")
    scores = {
        name: matrix(join(samples, read_table(bon / "scores" / f"{name}.parquet")), "score")
        for name in ("gold", *(arm.name for arm in arms))
    }
    reward_models = read_manifest(cfg.run_dir / "rm")["metrics"]["variants"]
    norms = {arm.name: (reward_models[arm.name]["reward_mean"], reward_models[arm.name]["reward_std"]) for arm in arms}
    gold = (scores["gold"] - scores["gold"].mean()) / scores["gold"].std(ddof=1)
    ns = np.arange(1, (cfg.bon.n_max or cfg.bon.samples) + 1)
    seed, rows, found = stream_seed(cfg.run.seed, "study"), [], {}
    for condition, seeds in by_condition(arms).items():
        proxies = np.stack([(scores[a.name] - norms[a.name][0]) / norms[a.name][1] for a in seeds])  # [S, P, N]
        sets = {condition: proxies}
        if len(seeds) > 1:
            flat = torch.from_numpy(proxies.reshape(len(seeds), -1))
            for rule in cfg.study.ensembles:
                combined = combine.combiner(rule)(flat).numpy().reshape(1, *gold.shape)
                sets[f"{condition} x {len(seeds)}, {rule}"] = combined
        for name, members in sets.items():
            for metric in ("proxy", "gold"):
                values = np.stack([best_of_n(p, p if metric == "proxy" else gold, ns) for p in members])  # [S, P, K]
                rows += curve_rows(values, name, metric, ns, cfg.bon.samples, cfg.eval.bootstrap, seed)
            found[name] = facts(rows, name, [reward_models[a.name]["accuracy_gold"]["mean"] for a in seeds])
    rows += curve_rows(oracle(gold, ns)[None], "oracle", "gold", ns, cfg.bon.samples, cfg.eval.bootstrap, seed)
    for policy in policies:
        rl = read_curves(cfg.run_dir / "policies" / policy.name / "eval" / "curves.csv")
        rows += [row | {"rm": policy.name} for row in rl if row["method"] == "ppo"]
    out.mkdir(exist_ok=True)
    write_curves(out / "curves.csv", rows)
    write_json(out / "conditions.json", found)
    (out / "study.md").write_text(page(cfg, found, rows, len(gold)))
    return f"study: {len(found)} conditions, {len(policies)} policies -> {out / 'study.md'}"


def by_condition(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.condition, []).append(arm)
    return groups


def crossed_bootstrap(
    values: np.ndarray, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [K] of values [S, P, K] and its 95% percentile interval, seeds and prompts drawn independently.

    With one seed only prompts are drawn. The same generator state gives paired draws to every condition of as many
    seeds.
    """
    S, P, _ = values.shape
    prompts = rng.multinomial(P, np.full(P, 1 / P), size=draws) / P
    seeds = rng.multinomial(S, np.full(S, 1 / S), size=draws) / S
    means = sum(seeds[:, s, None] * (prompts @ values[s]) for s in range(S))
    lo, hi = np.quantile(means, [0.025, 0.975], axis=0)
    return values.mean(axis=(0, 1)), lo, hi


def curve_rows(
    values: np.ndarray, name: str, metric: str, ns: np.ndarray, pool: int, draws: int, seed: int
) -> list[dict]:
    """Rows of `curves.csv` from values [S, P, K]."""
    mean, lo, hi = crossed_bootstrap(values, draws, np.random.default_rng(seed))
    kl = kl_bound(ns)
    return [
        {
            "rm": name, "method": "bon", "x": int(n), "d": float(np.sqrt(kl[k])), "kl": float(kl[k]),
            "kl_kind": "bound", "metric": metric, "mean": float(mean[k]), "lo": float(lo[k]), "hi": float(hi[k]),
            "prompts": values.shape[1], "pool": pool,
        }
        for k, n in enumerate(ns)
    ]  # fmt: skip


def facts(rows: list[dict], name: str, accuracies: list[float]) -> dict:
    gold = [row for row in rows if row["rm"] == name and row["metric"] == "gold"]
    trusted = [row for row in gold if 4 * row["x"] <= row["pool"]] or gold[:1]
    return {
        "accuracy": float(np.mean(accuracies)),
        "at_trusted_n": {k: trusted[-1][k] for k in ("x", "mean", "lo", "hi")},
        "at_n_max": {k: gold[-1][k] for k in ("x", "mean", "lo", "hi")},
    }


def page(cfg: Config, found: dict, rows: list[dict], prompts: int) -> str:
    cell = lambda x: f"{x['mean']:+.2f} [{x['lo']:+.2f}, {x['hi']:+.2f}]"  # noqa: E731
    last, trusted = (next(iter(found.values()))[k]["x"] for k in ("at_n_max", "at_trusted_n"))
    lines = [
        f"# Study {cfg.run.name}", "",
        f"{prompts} prompts, pools of {cfg.bon.samples}, {cfg.study.seeds} seeds a condition; gold in SD of the "
        "reference's samples, 95% intervals over seeds and prompts. Trust n up to a quarter of the pool.", "",
        f"| condition | held-out accuracy | gold, best of {trusted} | gold, best of {last} |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {f['accuracy']:.3f} | {cell(f['at_trusted_n'])} | {cell(f['at_n_max'])} |"
            for name, f in found.items()
        ),
    ]  # fmt: skip
    last_steps = {row["rm"]: row for row in rows if row["method"] == "ppo" and row["metric"] == "gold"}
    if last_steps:
        lines += ["", "| policy | steps | KL, nats | gold |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {name} | {r['x']} | {r['kl']:.2f} | {cell(r)} |" for name, r in last_steps.items()]
    return "\n".join(lines) + "\n"
