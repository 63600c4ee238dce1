"""What the evaluation allows to say, in sentences, and the checks without which it should not be believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bon.estimators import bootstrap_ci
from core.data.splits import normalised
from core.files import read_table

ENOUGH_PROMPTS = 500
"""Below it intervals of the gold change are wide (docs of the study); the report says so."""


def verdicts(
    table: list[dict], proxy: dict, gold: dict, gold_values: np.ndarray, steps: list[int], draws: int, seed: int
) -> list[str]:
    """Sentences for the first screen; `gold_values` is [P, steps]."""
    at = f" at KL {table[-1]['kl']:.2f} nats a response"
    said = [sentence("Proxy reward", proxy) + at + ".", sentence("Gold", gold) + "."]
    drop = cross_fitted_drop(gold_values, draws, seed)
    if proxy["lo"] <= 0:
        said.append("Nothing on over-optimisation: the proxy did not rise, so it was not optimised.")
    elif drop["lo"] > 0:
        said.append(f"Over-optimised: gold fell by {drop['mean']:.2f} SD from its best checkpoint {interval(drop)}.")
    else:
        said.append(f"No over-optimisation shown: drop from the best step {drop['mean']:+.2f} SD {interval(drop)}.")
    prompts = table[-1]["prompts"]
    said.append(f"Cannot conclude on the method: {prompts} prompts, one seed ({ENOUGH_PROMPTS} and 3 needed).")
    return said


def cross_fitted_drop(values: np.ndarray, draws: int, seed: int) -> dict[str, float]:
    """Best minus last checkpoint [P, steps], the best chosen on one half of the prompts and measured on the other.

    Choosing and measuring on the same prompts finds a drop in pure noise.
    """
    half = np.random.default_rng(seed).permutation(len(values)) % 2
    parts = []
    for fold in (0, 1):
        best = values[half == fold].mean(axis=0).argmax()
        parts.append(values[half != fold][:, best] - values[half != fold][:, -1])
    mean, lo, hi = bootstrap_ci(np.concatenate(parts)[:, None], draws, np.random.default_rng(seed))
    return {"mean": float(mean[0]), "lo": float(lo[0]), "hi": float(hi[0])}


def checks(prompts: Path, rows: list[dict], table: list[dict], bon_rows: list[dict]) -> list[dict]:
    """Name, verdict and detail of what would invalidate the figures."""
    texts: dict[str, set[str]] = {}
    for row in read_table(prompts / "prompts.parquet"):
        texts.setdefault(normalised(row["prompt"]), set()).add(row["split"])
    leaked = sum(len(splits) > 1 for splits in texts.values())
    bon = [row for row in bon_rows if row["method"] == "bon"]
    n, pool = max(row["x"] for row in bon), bon[0]["pool"]
    last = [r for r in rows if r["step"] == table[-1]["step"]]
    distinct = len({r["response"] for r in last}) / len(last)
    empty = sum(not r["response"].strip() for r in rows) / len(rows)
    # Two unbiased estimates of one KL: a wrong sign, span or temperature drives them apart.
    gap = np.array([r["kl_k1"] - r["kl_rb"] for r in rows if r["step"] > 0])
    error = gap.std(ddof=1) / len(gap) ** 0.5
    mismatch = sum(abs(r["logp"] - r["logp_sampler"]) for r in rows) / sum(r["n_tokens"] for r in rows)
    asked = [
        ("prompts of different splits are disjoint", leaked == 0, f"{leaked} shared"),
        ("two estimates of KL agree", abs(gap.mean()) <= 4 * error, f"k1 - exact {gap.mean():+.3f}, SE {error:.3f}"),
        ("vLLM sampled from the weights evaluated", mismatch < 0.1, f"log-prob gap {mismatch:.3f} nats a token"),
        ("best-of-n pools are at least 4 n", pool >= 4 * n, f"n to {n}, pools of {pool}: trust n <= {pool // 4}"),
        ("at least 3 seeds", False, "one seed of the reward model and of PPO"),
        (f"at least {ENOUGH_PROMPTS} prompts", table[-1]["prompts"] >= ENOUGH_PROMPTS, f"{table[-1]['prompts']}"),
        ("responses end by themselves", table[-1]["eos_rate"] > 0.5, f"{table[-1]['eos_rate']:.0%} do"),
        ("few empty responses", empty < 0.02, f"{empty:.1%}"),
        ("responses differ", distinct > 0.9, f"{distinct:.0%} distinct at the last step"),
    ]  # fmt: skip
    return [{"name": name, "ok": bool(ok), "detail": detail} for name, ok, detail in asked]


def sentence(what: str, change: dict) -> str:
    """Rose, fell, or cannot be told, with the interval."""
    if change["lo"] <= 0 <= change["hi"]:
        return f"{what}: cannot tell; its change of {change['mean']:+.2f} SD has the 95% interval {interval(change)}"
    verb = "rose" if change["mean"] > 0 else "fell"
    return f"{what} {verb} by {abs(change['mean']):.2f} SD (95% interval {interval(change)})"


def interval(x: dict) -> str:
    return f"[{x['lo']:+.2f}, {x['hi']:+.2f}]"
