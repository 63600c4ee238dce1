"""Stage `bon`: pools of samples of the reference policy, scored by every proxy and by gold; best-of-n curves."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np

from bon.curves import curve, matrix, write_curves
from bon.estimators import best_of_n, kl_bound, oracle
from bon.scores import score_proxies, write_scores
from core.config import Config
from core.data.chat import ChatTokenizer
from core.data.splits import read_split
from core.data.streams import stream_seed
from core.files import join, read_table
from core.generation.local import Generator
from core.generation.pool import sample_pool
from rm.gold import load_gold, score_samples


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    samples = _sample(cfg, inputs["prompts"], out)
    gc.collect()  # the engine's memory, before reward models are loaded
    norms = score_proxies(inputs["rm"], samples, out)
    if not (out / "scores" / "gold.parquet").exists():
        write_scores(out / "scores" / "gold.parquet", samples, score_samples(load_gold(cfg.gold), samples).tolist())
    return analyse(cfg, out, samples, norms)


def _sample(cfg: Config, prompts: Path, out: Path) -> list[dict]:
    tokenizer = ChatTokenizer(cfg.policy)
    rows = read_split(prompts, "eval", cfg.bon.prompts)
    return sample_pool(
        lambda: Generator(cfg.policy, cfg.generation, tokenizer), tokenizer, rows, cfg.bon.samples,
        out=out, shard_prompts=cfg.bon.shard_prompts, seed=cfg.run.seed, name="bon",
    )  # fmt: skip


def analyse(cfg: Config, out: Path, samples: list[dict], norms: dict[str, tuple[float, float]]) -> dict:
    """Curves for every n from the scores on disk, joined by id, and the headline."""
    joined = {
        name: matrix(join(samples, read_table(out / "scores" / f"{name}.parquet")), "score")
        for name in ("gold", *norms)
    }
    gold_mean, gold_std = float(joined["gold"].mean()), float(joined["gold"].std(ddof=1))
    gold = (joined["gold"] - gold_mean) / gold_std
    length = matrix(samples, "n_tokens")
    ns = np.arange(1, (cfg.bon.n_max or cfg.bon.samples) + 1)
    common = {
        "method": "bon", "xs": ns, "kl": kl_bound(ns), "kl_kind": "bound", "pool": cfg.bon.samples,
        "draws": cfg.eval.bootstrap, "seed": stream_seed(cfg.run.seed, "bootstrap"),
    }  # fmt: skip
    rows, found = [], {}
    for name, (mean, std) in norms.items():
        proxy = joined[name]
        values = {"proxy": (proxy - mean) / std, "gold": gold, "length": length}
        curves = {m: curve(best_of_n(proxy, v, ns), rm=name, metric=m, **common) for m, v in values.items()}
        rows += [row for part in curves.values() for row in part]
        last = curves["gold"][-1]
        found[name] = {
            "gold_at_n_max": {k: last[k] for k in ("mean", "lo", "hi")},
            "within_prompt_correlation": within_prompt_correlation(proxy, joined["gold"]),
        }
    rows += curve(oracle(gold, ns), rm="oracle", metric="gold", **common)
    write_curves(out / "curves.csv", rows)
    best = rows[-1]["mean"]
    parts = [f"{k} {v['gold_at_n_max']['mean']:+.2f}" for k, v in found.items()]
    return {
        "headline": f"gold at n={ns[-1]} of {len(gold)} prompts, in SD of the reference: " + ", ".join(parts)
        + f", oracle {best:+.2f}",
        "gold_mean": gold_mean,
        "gold_std": gold_std,
        "variants": found,
        "oracle_at_n_max": best,
        "duplicates": 1 - len({(s["prompt_id"], s["response"]) for s in samples}) / len(samples),
    }  # fmt: skip


def within_prompt_correlation(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    """Pearson correlation of deviations from the prompt's mean, [P, N] pooled; None when one does not vary."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (proxy, gold))
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / scale) if scale else None
