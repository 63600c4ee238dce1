"""How often the study's verdicts are right, on planted curves: docs/verdicts.md.

    make verdict-errors      # some 20 minutes on two cores

Pools are drawn in which gold rises with what the proxies see and bends down in its tail, so that the drop of gold at
the largest n is the planted one. Each is judged as a study judges it, and verdicts are counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bon.estimators import best_of_n, kl_bound
from bon.gains import gains
from study.analysis.bootstrap import Array
from study.analysis.conditions import Curve
from study.analysis.verdict import NO_TURN_OVER, OVER_OPTIMISED, verdict

DRAWS = 300
LARGE = 4000
"""Prompts by which the truth is computed."""
DOCS = Path(__file__).parents[1] / "docs"
KINDS = (OVER_OPTIMISED, NO_TURN_OVER, "does not help", "harms from the start", "cannot conclude")


@dataclass(frozen=True)
class World:
    """What pools are drawn from: gold = slope * z - bend * max(z - 1, 0)^2 + noise, where z is what the proxies see."""

    drop: float = 0.0
    """Planted drop of gold from its peak to n = samples, in standard deviations within prompts."""
    prompts: int = 200
    samples: int = 64
    seeds: int = 3
    slope: float = 1.0
    """0: a proxy that has nothing to do with gold; below 0: one that harms."""
    ties: bool = False
    """Proxy rewards are rounded to half a standard deviation."""
    tails: bool = False
    """Gold's noise is Student's t with 3 degrees of freedom, and the proxies are exp of what they would be."""
    seed_noise: float = 0.3
    """Of a seed's proxy, in standard deviations of z."""


def pools(world: World, bend: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Gold [P, N] and proxies [S, P, N]."""
    shape = (world.prompts, world.samples)
    z = rng.normal(size=shape)
    noise = rng.standard_t(3, size=shape) / np.sqrt(3) if world.tails else rng.normal(size=shape)
    gold = world.slope * z - bend * np.maximum(z - 1, 0) ** 2 + noise + 2 * rng.normal(size=(world.prompts, 1))
    proxies = z + world.seed_noise * rng.normal(size=(world.seeds, *shape))
    if world.ties:
        proxies = np.round(2 * proxies) / 2
    return gold, np.exp(proxies) if world.tails else proxies


def grid(samples: int) -> np.ndarray:
    """Values of n up to `samples`, some 25 of them."""
    return np.unique(np.round(np.geomspace(1, samples, 25)).astype(int))


def gold_curve(gold: Array, proxies: Array, seed: int = 0) -> Curve:
    """Best-of-n by the proxies, as a study computes it."""
    ns = grid(gold.shape[1])
    values = np.stack([best_of_n(proxy, gains(gold), ns) for proxy in proxies])
    return Curve("planted", "bon", "gold", ns, kl_bound(ns), "bound", values, gold.shape[1], DRAWS, seed)


@cache
def bend_of(world: World) -> float:
    """The bend by which gold of many prompts falls by `world.drop`."""
    if not world.drop:
        return 0.0
    many = replace(world, prompts=LARGE, seeds=1, drop=0.0)
    low, high = 0.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        if true_drop(many, middle) < world.drop:
            low = middle
        else:
            high = middle
    return high


def true_drop(world: World, bend: float) -> float:
    """The drop of gold from its peak, of pools so large that it has next to no error."""
    mean = gold_curve(*pools(replace(world, prompts=LARGE, seeds=1), bend, np.random.default_rng(1))).mean
    return float(mean.max() - mean[-1])


def judged(world: World, times: int) -> Iterator[tuple[Curve, str]]:
    """So many studies of the world: gold's curve and the verdict."""
    key = replace(world, prompts=LARGE, seeds=1)
    bend = bend_of(key)
    for k in range(times):
        curve = gold_curve(*pools(world, bend, np.random.default_rng([2, k])), seed=k)
        yield curve, verdict(curve.evidence()[0], curve.end).kind


WORLDS: dict[str, Sequence[World]] = {
    "strength of the drop": [World(d) for d in (0.0, 0.1, 0.2, 0.23, 0.4)],
    "seeds": [World(d, seeds=s) for s in (1, 2, 5) for d in (0.0, 0.23)],
    "prompts": [World(d, prompts=p) for p in (20, 50, 100, 500) for d in (0.0, 0.23)],
    "samples a prompt": [World(d, samples=n) for n in (16, 256, 1024) for d in (0.0, 0.23)],
    "ties": [World(d, ties=True) for d in (0.0, 0.23)],
    "heavy tails": [World(d, tails=True) for d in (0.0, 0.23)],
    "a proxy that does not help": [World(slope=0.0, seeds=s) for s in (1, 3)],
    "a proxy that harms": [World(slope=-0.3, seeds=s) for s in (1, 3)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="studies of each row (%(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS / "verdicts.md")
    options = parser.parse_args()
    options.out.write_text(page(options.times), encoding="utf-8")


def page(times: int) -> str:
    lines = [
        "# How often verdicts are right",
        "",
        f"`make verdict-errors`: {times} simulated studies a row. Gold rises with what the proxies see and bends down",
        "in its tail, so much that best-of-n at the largest n lies the planted drop below its peak, in standard",
        "deviations within prompts. A row says how many of 100 studies came to each verdict.",
        "",
        "| what varies | prompts | samples | seeds | planted drop | " + " | ".join(KINDS) + " |",
        "| --- |" + " ---: |" * (4 + len(KINDS)),
    ]
    for what, worlds in WORLDS.items():
        for world in tqdm(worlds, desc=what):
            counts = Counter(kind for _, kind in judged(world, times))
            shares = (f"{100 * counts[kind] / times:.1f}" if counts[kind] else "0" for kind in KINDS)
            facts = (what, world.prompts, world.samples, world.seeds, f"{world.drop:g}")
            lines.append(f"| {' | '.join(map(str, facts))} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
