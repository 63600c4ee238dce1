"""A whole study with planted scores: conditions of several sizes and noises, ensembles, policies of several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bon.pools import Pools
from study.analysis.conditions import Plan
from study.design import Condition
from study.records import Results, Series
from study.results import results

PLAN = Plan(np.arange(1, 65), draws=200, ensembles=("mean", "min", "uwo:0.5"), temperatures=(0.5,))
STEPS = 9


def study(
    cells: Sequence[Condition],
    *,
    seeds: int = 3,
    prompts: int = 80,
    trained: Sequence[Condition] = (),
    coefs: Sequence[float] = (0.0,),
    policy_seeds: int = 3,
    plan: Plan = PLAN,
) -> Results:
    """Gold is what all proxies see, less what grows in its tail; noise of labels makes proxies worse, size better.

    Args:
        trained: conditions that policies are trained against; those with a rule are ensembles.
    """
    rng = np.random.default_rng(0)
    z = rng.normal(size=(prompts, 64))
    gold = z - 0.35 * np.maximum(z - 1, 0) ** 2 + 0.3 * rng.normal(size=z.shape)
    names = {c: [f"{c.name}-seed{s}" for s in range(seeds)] for c in cells}
    scores = {name: z + _error(c) * rng.normal(size=z.shape) for c, of in names.items() for name in of}
    for c in (c for c in trained if c.rule):  # what PPO optimises
        scores[c.name] = np.min([scores[name] for name in names[c.members]], axis=0)
    table = Pools(
        tuple(f"p{i:03d}" for i in range(prompts)), gold, scores,
        length=rng.integers(5, 50, size=z.shape).astype(float),
        prompts=tuple(f"question {i}" for i in range(prompts)),
        responses=tuple(tuple(f"answer {i}.{k}" for k in range(64)) for i in range(prompts)),
    )  # fmt: skip
    series = {}
    for c in trained:
        for seed in range(policy_seeds):
            for coef in coefs:
                name = f"{c.name}-seed{seed}-kl{coef:g}"
                proxy = c.name if c.rule else names[c][seed]
                series[name] = Series(_policy(rng, c, coef, table, proxy), proxy, c, coef, seed)
    first = {c.cell: c for c in reversed(cells)}
    return results(table, names, series, plan, {c: first[c.cell] for c in cells}, rules=("mean", "min"), facts={
        name: {"layers": c.layers, "pairs": c.pairs, "params": 5_000_000 * (c.layers or 6), "val_loss_nats":
               0.5 + 0.1 * _error(c) + 0.02 * k, "accuracy_gold": 0.8 - 0.1 * _error(c), "base": "planted"}
        for c, of in names.items() for k, name in enumerate(of)
    })  # fmt: skip


def _error(c: Condition) -> float:
    base = 0.5 + 2 * (c.label_noise or 0.0) - (0.2 if c.variant == "grm" else 0.0)
    return base * (12 / (c.layers or 12)) ** 0.5 * (300 / (c.pairs or 300)) ** 0.5


def _policy(rng: np.random.Generator, c: Condition, coef: float, table: Pools, proxy: str) -> list[dict]:
    """Gold rises to a KL of about 4 and then falls, less for grm and for ensembles; a penalty stops earlier."""
    bend = (0.14 if c.variant == "bt" else 0.09) - (0.03 if c.rule else 0.0)
    slope, speed, rows = 0.5 + 0.05 * rng.normal(), rng.uniform(0.8, 1.2) / (1 + 20 * coef), []
    origin = {"gold": table.gold.mean(axis=1), "proxy": table.proxies[proxy].mean(axis=1)}
    for step in range(STEPS):
        d = 0.7 * step * speed
        for i, prompt in enumerate(table.prompt_ids):
            kl = d * d * np.exp(0.2 * rng.normal())
            rows.append({
                "step": 4 * step, "prompt_id": prompt, "sample_id": 0, "kl_rb": kl, "kl_k1": kl, "n_tokens": 20,
                "finished": True, "proxy": float(origin["proxy"][i] + 0.6 * d + 0.4 * rng.normal()),
                "gold": float(origin["gold"][i] + d * (slope - bend * d) + 0.4 * rng.normal()),
            })  # fmt: skip
    return rows


def two_methods() -> Results:
    """BT and GRM with a quarter of the labels wrong, three seeds, a policy each, and policies against an ensemble."""
    cells = [Condition(v, 128, 12, 0.25) for v in ("bt", "grm")]
    return study(cells, trained=[*cells, replace(cells[0], rule="min", combined=3)])


def many_cells() -> Results:
    """Two methods, three noises and two sizes: more conditions than colours; policies with two KL coefficients."""
    cells = [Condition(v, p, 12, n) for p in (128, 512) for n in (0.0, 0.25, 0.4) for v in ("bt", "grm")]
    trained = [c for c in cells if c.pairs == 128 and c.label_noise == 0.25]
    return study(cells, trained=trained, coefs=(0.0, 0.05), policy_seeds=2, prompts=40)
