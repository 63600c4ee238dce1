"""Stage `bon`: pools of samples of the reference policy, scored by every proxy and by gold; best-of-n curves."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from bon.curves import curve, matrix, write_curves
from bon.estimators import best_of_n, kl_bound, oracle
from core.artefacts import digest, join, read_json, read_table, write_table
from core.config import Config
from core.data.chat import ChatTokenizer, Message, stream_seed
from core.generation.local import Generator
from core.generation.pool import conversation, sample_pool
from core.models.layers import LowerLayers, shared_depth
from pipelines.prompts import read_split
from rm.gold import load_gold, score_samples
from rm.model import ABOUT_FILE, RewardModel
from rm.objective import LowerCache
from rm.score import tokens_of

CACHED_STATES = 4 << 30
"""Bytes of host memory for the output of layers that several reward models share."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    samples = _sample(cfg, inputs["prompts"], out)
    gc.collect()  # the engine's memory, before reward models are loaded
    norms = score_proxies(inputs["rm"], samples, out)
    if not (out / "scores" / "gold.parquet").exists():
        write_scores(out / "scores" / "gold.parquet", samples, score_samples(load_gold(cfg.gold), samples).tolist())
    return analyse(cfg, out, samples, norms)


def score_proxies(folder: Path, samples: list[dict], out: Path) -> dict[str, tuple[float, float]]:
    """A table of rewards for each reward model that has none yet; mean and SD of each under the reference policy."""
    names = reward_models(folder)
    load = lambda name: RewardModel.from_pretrained(folder / name)  # noqa: E731
    waiting = [name for name in names if not (out / "scores" / f"{name}.parquet").exists()]
    conversations = [conversation(s) for s in samples]
    # Sizes one after the other: models of two sizes have only the smaller one's frozen layers in common.
    depth = lambda name: read_json(folder / name / "config.json").get("num_hidden_layers", 0)  # noqa: E731
    for alike in (list(names) for _, names in groupby(sorted(waiting, key=depth), key=depth)):
        shared, models = None, {}
        if len(alike) > 1:
            models = {name: load(name) for name in alike[:2]}
            shared = SharedLayers.of(*models.values(), conversations)
        for name in alike:
            model = models.pop(name, None) or load(name)
            lower = shared.cache if shared and shared.fits(model) else None
            rewards = model.score(conversations, lower=lower, progress=f"bon: {name}")
            write_scores(out / "scores" / f"{name}.parquet", samples, rewards.tolist())
    about = {name: read_json(folder / name / ABOUT_FILE) for name in names}
    return {name: (facts["mean"], facts["std"]) for name, facts in about.items()}


class SharedLayers:
    """The lowest layers that reward models of one base have in common, run once for all of them."""

    def __init__(self, model: RewardModel, depth: int):
        self.model, self.cache = model, LowerCache(LowerLayers(model.lm, depth))

    @classmethod
    def of(
        cls, first: RewardModel, second: RewardModel, conversations: Sequence[Sequence[Message]]
    ) -> SharedLayers | None:
        """None where they share none, or where their states would take more than CACHED_STATES."""
        depth = shared_depth(first.lm.requires_grad_(False), second.lm.requires_grad_(False))
        if not depth or not first.shares_prompts:
            return None
        tokens = sum(map(len, (t for pair in {tokens_of(first.tokenizer, c) for c in conversations} for t in pair)))
        size = tokens * first.lm.config.hidden_size * next(first.parameters()).element_size()
        return cls(first, depth) if size <= CACHED_STATES else None

    def fits(self, model: RewardModel) -> bool:
        same = model.tokenizer.fingerprint == self.model.tokenizer.fingerprint
        return same and shared_depth(self.model.lm, model.lm.requires_grad_(False)) >= self.cache.layers.depth


def reward_models(rm_folder: Path) -> list[str]:
    """Names of the reward models in the folder of stage `rm`."""
    return sorted(p.parent.name for p in rm_folder.glob("*/reward_model.json"))


def _sample(cfg: Config, prompts: Path, out: Path) -> list[dict]:
    tokenizer = ChatTokenizer(cfg.policy)
    rows = read_split(prompts, "eval", cfg.bon.prompts)
    return sample_pool(
        lambda: Generator(cfg.policy, cfg.generation, tokenizer), tokenizer, rows, cfg.bon.samples,
        out=out, shard_prompts=cfg.bon.shard_prompts, seed=cfg.run.seed, name="bon",
    )  # fmt: skip


def write_scores(path: Path, samples: list[dict], scores: list[float]) -> None:
    """Rows of prompt_id, sample_id, text_sha (of the response, so that scores of other samples do not join), score."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt_id": s["prompt_id"], "sample_id": s["sample_id"], "text_sha": digest(s["response"]), "score": x}
        for s, x in zip(samples, scores, strict=True)
    ]
    write_table(path, rows)


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
