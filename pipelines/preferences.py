"""Stage `preferences`: pairs of samples that the gold reward model labels, or imported pairs; with label noise.

Two responses are sampled to each prompt of rm_train and rm_val, unless pairs are imported, and to each calibration
prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np

from bon.scores import put_together, score_gold
from core.config import Config
from core.data.chat import ChatTokenizer
from core.data.labels import flip_labels
from core.data.rows import CalibrationRow, PairRow, ResponseRow, SampleRow, ScoreRow
from core.data.splits import pair_id, read_split
from core.data.streams import stream_seed
from core.errors import ArtefactError
from core.files import join, read_table, write_table
from core.generation.local import Generator
from core.generation.pool import sample_pool
from core.shares import Share
from pipelines.import_pairs import Imported, import_pairs
from rm.gold import with_reading
from rm.reading import TextReading

PAIR_SPLITS = ("rm_train", "rm_val")
SAMPLES = 2


class Noise(TypedDict):
    requested: float
    """Share of pairs whose label `preferences.label_noise` flips."""
    realised: float


class PreferencesMetrics(TypedDict):
    headline: str
    pairs: dict[str, int]
    """Pairs of each split."""
    dropped: dict[str, dict[str, int]]
    """Pairs that are not used, by split (sampled pairs) or source (imported ones), and by reason."""
    noise: dict[str, Noise]
    """By split."""
    gold_gap_median: float | None
    """Of the difference in gold within pairs; None for imported pairs."""
    gold_mean: float
    """Of the calibration samples."""
    gold_std: float
    gold_length_correlation: float | None
    """Pearson correlation of gold with words, over all samples; None where one of them is constant."""
    response_tokens: float
    """Mean length of a sample."""
    finished: float
    """Share of samples that ended by themselves."""
    rejected: dict[str, int]
    """Malformed rows of imported sources, by reason."""
    changed: dict[str, int]
    """Rows of imported sources that were used after a change, or left out for no fault of theirs, by what was done."""
    unread_columns: list[str]
    """Columns of imported sources with content that nothing was read from."""
    sources: dict[str, int]
    """Pairs of each source."""
    gold_reads_text: NotRequired[TextReading | None]
    """What gold does not see of the samples; None where it reads their tokens."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> PreferencesMetrics | None:
    """Writes `samples.parquet`, `pairs.parquet`, `calibration.parquet` and `scores/gold.parquet`.

    Returns:
        The metrics of the stage on the first process, nothing on the others.
    """
    share, tokenizer, preferences = Share.of_this_process(), ChatTokenizer(cfg.policy), cfg.preferences
    seed, imported = cfg.run.seed, None
    if preferences.sources and share.is_first:
        imported = import_pairs(preferences, cfg.data, prompts=inputs["prompts"], seed=seed, out=out)
    limits = {"rm_train": preferences.max_train_pairs, "rm_val": preferences.max_val_pairs}
    sampled = ({} if preferences.sources else limits) | {"calibration": preferences.max_calibration_prompts}
    prompts = [row for split, limit in sampled.items() for row in read_split(inputs["prompts"], split, limit)]
    pool = sample_pool(
        lambda: Generator(cfg.policy, cfg.generation, tokenizer), tokenizer, prompts, SAMPLES,
        out=out, shard_prompts=preferences.shard_prompts, seed=seed, name="preferences", share=share,
    )  # fmt: skip
    table = out / "scores" / "gold.parquet"
    gold = score_gold(cfg.gold, table, pool)
    if gold is None or not share.is_first:
        return None
    put_together([table], pool, title="preferences")
    samples = pool.whole()
    scores = np.array([row["score"] for row in join(samples, read_table(table, ScoreRow))])
    clean, dropped = _imported_pairs(imported, limits) if imported else _sampled_pairs(samples, scores)
    pairs, noise = noisy_pairs(clean, dropped, preferences.label_noise, seed)
    _write(out, samples, pairs)
    metrics = _metrics(samples, scores, pairs, dropped, noise, imported)
    rows = cast(list[ResponseRow], samples)
    return cast(PreferencesMetrics, with_reading(cast(dict, metrics), gold, tokenizer, rows))


def _imported_pairs(
    imported: Imported, limits: Mapping[str, int | None]
) -> tuple[dict[str, list[PairRow]], dict[str, dict[str, int]]]:
    return {split: imported.pairs[split][:limit] for split, limit in limits.items()}, imported.dropped


def _sampled_pairs(
    samples: Sequence[SampleRow], scores: np.ndarray
) -> tuple[dict[str, list[PairRow]], dict[str, dict[str, int]]]:
    found = {split: clean_pairs(samples, scores, split) for split in PAIR_SPLITS}
    return {split: pairs for split, (pairs, _) in found.items()}, {split: lost for split, (_, lost) in found.items()}


def clean_pairs(samples: Sequence[SampleRow], scores: np.ndarray, split: str) -> tuple[list[PairRow], dict[str, int]]:
    """Pairs of one split with the better sample by gold as chosen, and how many were dropped by reason.

    Args:
        samples: rows of the pool, the two of a prompt side by side.
        scores: gold, one per sample.
    """
    pairs: list[PairRow] = []
    dropped = Counter({"identical": 0, "empty": 0, "gold tie": 0})
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
                "pair_id": pair_id(two[0]["prompt_id"], [s["response"] for s in two]),
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
                "chosen_ids": list(two[best]["token_ids"]),
                "rejected_ids": list(two[worst]["token_ids"]),
                "tokenizer": two[0].get("tokenizer"),
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


def noisy_pairs(
    clean: Mapping[str, list[PairRow]], dropped: Mapping[str, dict[str, int]], rate: float, seed: int
) -> tuple[list[PairRow], dict[str, Noise]]:
    """The pairs of all splits with a share `rate` of the labels flipped in each, and the realised shares.

    Raises:
        ArtefactError: a split with fewer than two pairs; the message has the counts of `dropped`.
    """
    pairs: list[PairRow] = []
    noise: dict[str, Noise] = {}
    for split, kept in clean.items():
        if len(kept) < 2:
            raise ArtefactError(f"split {split!r} keeps {len(kept)} pairs; dropped: {dropped.get(split, dropped)}")
        rng = np.random.default_rng(stream_seed(seed, "label_noise", split))
        labelled = flip_labels(kept, rate, rng)
        noise[split] = {"requested": rate, "realised": sum(p["flipped"] for p in labelled) / len(labelled)}
        pairs += labelled
    return pairs, noise


def _write(out: Path, samples: Sequence[SampleRow], pairs: list[PairRow]) -> None:
    calibration: list[CalibrationRow] = [
        {
            "prompt_id": s["prompt_id"],
            "sample_id": s["sample_id"],
            "prompt": s["prompt"],
            "response": s["response"],
            "token_ids": list(s["token_ids"]),
            "tokenizer": s.get("tokenizer"),
        }
        for s in samples
        if s["split"] == "calibration"
    ]
    write_table(out / "pairs.parquet", pairs, PairRow)
    # Without gold: PPO reads this table to standardise its proxy, and may not see what it is measured by.
    write_table(out / "calibration.parquet", calibration, CalibrationRow)


def _metrics(
    samples: Sequence[SampleRow],
    scores: np.ndarray,
    pairs: list[PairRow],
    dropped: dict[str, dict[str, int]],
    noise: dict[str, Noise],
    imported: Imported | None,
) -> PreferencesMetrics:
    sizes = Counter(pair["split"] for pair in pairs)
    golds = [(pair["gold_chosen"], pair["gold_rejected"]) for pair in pairs]
    gaps = [abs(a - b) for a, b in golds if a is not None and b is not None]
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
            f"label noise {realised:.1%} (requested {noise['rm_train']['requested']:.0%}), {lost} dropped"
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
        "rejected": dict(imported.malformed.counts) if imported else {},
        "changed": dict(imported.malformed.changed) if imported else {},
        "unread_columns": sorted(imported.malformed.unread) if imported else [],
        "sources": dict(Counter(pair["source"] for pair in pairs)),
    }
