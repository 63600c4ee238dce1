"""Rows of `curves.csv`: proxy, gold and length against KL, in one form for best-of-n and PPO."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bon.estimators import bootstrap_ci

COLUMNS = ("rm", "method", "x", "d", "kl", "kl_kind", "metric", "mean", "lo", "hi", "prompts", "pool")
"""x is n of best-of-n or the PPO step; d = sqrt(kl), kl in nats. Proxy and gold are in standard deviations of
samples of the reference policy, from their mean; length is in tokens."""


def matrix(rows: Sequence[dict], column: str) -> np.ndarray:
    """[P, N] of `column`: prompts in order of their ids, samples in order of theirs; ValueError on ragged pools."""
    pools: dict[str, dict[int, float]] = {}
    for row in rows:
        pools.setdefault(row["prompt_id"], {})[row["sample_id"]] = row[column]
    sizes = {len(pool) for pool in pools.values()}
    if len(sizes) != 1 or sum(map(len, pools.values())) != len(rows):
        raise ValueError(f"pools are ragged or hold an id twice: sizes {sorted(sizes)}, {len(rows)} rows")
    return np.array([[pools[p][s] for s in sorted(pools[p])] for p in sorted(pools)], dtype=np.float64)


def curve(
    per_prompt: np.ndarray, *, rm: str, method: str, metric: str, xs: Sequence[int], kl: Sequence[float], kl_kind: str,
    pool: int, draws: int, seed: int,
) -> list[dict]:  # fmt: skip
    """One row a point from per-prompt values [P, K]; the same seed gives paired draws to every curve."""
    mean, lo, hi = bootstrap_ci(per_prompt, draws, np.random.default_rng(seed))
    return [
        {
            "rm": rm, "method": method, "x": int(x), "d": math.sqrt(max(0.0, k)), "kl": float(k), "kl_kind": kl_kind,
            "metric": metric, "mean": m, "lo": a, "hi": b, "prompts": len(per_prompt), "pool": pool,
        }
        for x, k, m, a, b in zip(xs, kl, mean.tolist(), lo.tolist(), hi.tolist(), strict=True)
    ]  # fmt: skip


def write_curves(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read_curves(path: Path) -> list[dict]:
    numbers = {"d", "kl", "mean", "lo", "hi"}
    whole = {"x", "prompts", "pool"}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {k: float(v) if k in numbers else int(v) if k in whole else v for k, v in row.items()}
            for row in csv.DictReader(file)
        ]
