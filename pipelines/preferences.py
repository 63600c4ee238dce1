"""Stage `preferences`: two samples of each prompt, labelled by the gold reward model; or pairs of others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from core.config import Config
from core.data.chat import ChatTokenizer
from core.data.labels import flip_labels
from core.data.sources import Malformed
from core.data.splits import read_split
from core.data.streams import stream_seed
from core.errors import ArtefactError
from core.files import digest, write_table
from core.generation.local import Generator
from core.generation.pool import sample_pool
from pipelines.import_pairs import import_pairs
from rm.gold import load_gold, score_samples

PAIR_SPLITS = ("rm_train", "rm_val")
SAMPLES = 2


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    """Writes `samples.parquet`, `pairs.parquet`, `calibration.parquet` and `scores/gold.parquet`."""
    tokenizer, asked = ChatTokenizer(cfg.policy), cfg.preferences
    limits = {"rm_train": asked.max_train_pairs, "rm_val": asked.max_val_pairs}
    imported, dropped, malformed = import_pairs(cfg, inputs["prompts"], out) if asked.sources else ({}, {}, Malformed())
    sampled = limits | {"calibration": asked.max_calibration_prompts}
    if imported:
        sampled = {"calibration": asked.max_calibration_prompts}
    prompts = [row for split, limit in sampled.items() for row in read_split(inputs["prompts"], split, limit)]
    samples = sample_pool(
        lambda: Generator(cfg.policy, cfg.generation, tokenizer), tokenizer, prompts, SAMPLES,
        out=out, shard_prompts=asked.shard_prompts, seed=cfg.run.seed, name="preferences",
    )  # fmt: skip
    scores = score_samples(load_gold(cfg.gold), samples)

    pairs, noise = [], {}
    for split, limit in limits.items():
        if imported:
            clean = imported[split][:limit]
        else:
            clean, dropped[split] = clean_pairs(samples, scores, split)
        if len(clean) < 2:
            raise ArtefactError(f"split {split!r} keeps {len(clean)} pairs; dropped: {dropped.get(split, dropped)}")
        rng = np.random.default_rng(stream_seed(cfg.run.seed, "label_noise", split))
        labelled = flip_labels(clean, asked.label_noise, rng)
        noise[split] = {"requested": asked.label_noise, "realised": sum(p["flipped"] for p in labelled) / len(labelled)}
        pairs += labelled
    _write(out, samples, scores, pairs)
    metrics = _metrics(samples, scores, pairs, dropped, noise)
    return metrics | {"rejected": dict(malformed.counts), "sources": dict(Counter(pair["source"] for pair in pairs))}


def clean_pairs(samples: list[dict], scores: np.ndarray, split: str) -> tuple[list[dict], dict[str, int]]:
    """Pairs of one split with the better sample by gold as chosen, and how many were dropped by reason.

    Args:
        samples: rows of the pool, the two of a prompt side by side.
        scores: gold, one a sample.
    """
    pairs, dropped = [], Counter({"identical": 0, "empty": 0, "gold tie": 0})
    for start in range(0, len(samples), SAMPLES):
        two = samples[start : start + SAMPLES]
        if two[0]["split"] != split:
            continue
        gold = scores[start : start + SAMPLES]
        if reason := _unusable([s["response"] for s in two], gold):
            dropped[reason] += 1
            continue
        best, worst = int(np.argmax(gold)), int(np.argmin(gold))
        pairs.append(
            {
                "prompt_id": two[0]["prompt_id"],
                "pair_id": digest([two[0]["prompt_id"], sorted(s["response"] for s in two)]),
                "split": split,
                "source": "policy",
                "prompt": two[0]["prompt"],
                "chosen": two[best]["response"],
                "rejected": two[worst]["response"],
                "flipped": False,
                "margin": None,
                "weight": 1.0,
                "gold_chosen": float(gold[best]),
                "gold_rejected": float(gold[worst]),
            }
        )
    return pairs, dict(dropped)


def _unusable(texts: list[str], gold: np.ndarray) -> str | None:
    """Why two responses make no pair; None when they do."""
    if not all(text.strip() for text in texts):
        return "empty"
    if texts[0] == texts[1]:
        return "identical"
    return "gold tie" if gold[0] == gold[1] else None


def _write(out: Path, samples: list[dict], scores: np.ndarray, pairs: list[dict]) -> None:
    ids = [{"prompt_id": s["prompt_id"], "sample_id": s["sample_id"]} for s in samples]
    calibration = [
        key | {"prompt": s["prompt"], "response": s["response"]}
        for key, s in zip(ids, samples, strict=True)
        if s["split"] == "calibration"
    ]
    (out / "scores").mkdir(exist_ok=True)
    write_table(out / "pairs.parquet", pairs)
    # Without gold: PPO reads this table to standardise its proxy, and may not see what it is measured by.
    write_table(out / "calibration.parquet", calibration)
    write_table(out / "scores" / "gold.parquet", [k | {"score": float(x)} for k, x in zip(ids, scores, strict=True)])


def _metrics(samples: list[dict], scores: np.ndarray, pairs: list[dict], dropped: dict, noise: dict) -> dict:
    sizes = Counter(pair["split"] for pair in pairs)
    gaps = [abs(p["gold_chosen"] - p["gold_rejected"]) for p in pairs if p["gold_chosen"] is not None]
    gap = float(np.median(gaps)) if gaps else None
    about = f"imported from {len(dropped)} sources" if gap is None else f"gold gap median {gap:.2f}"
    calibration = scores[[s["split"] == "calibration" for s in samples]]
    words = np.array([len(s["response"].split()) for s in samples], dtype=float)
    varied = words.std() > 0 and scores.std() > 0
    realised = sum(p["flipped"] for p in pairs) / len(pairs)
    lost = sum(sum(reasons.values()) for reasons in dropped.values())
    return {
        "headline": (
            f"{'+'.join(str(sizes[split]) for split in PAIR_SPLITS)} pairs, {about}, "
            f"noise {realised:.1%} (asked {noise['rm_train']['requested']:.0%}), {lost} dropped"
        ),
        "pairs": dict(sizes),
        "dropped": dropped,
        "noise": noise,
        "gold_gap_median": gap,
        "gold_mean": float(calibration.mean()),
        "gold_std": float(calibration.std()),
        "gold_length_correlation": float(np.corrcoef(words, scores)[0, 1]) if varied else None,
        "response_tokens": float(np.mean([s["n_tokens"] for s in samples])),
        "finished": float(np.mean([s["finished"] for s in samples])),
    }
