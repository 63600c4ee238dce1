"""Imported preference pairs made ready for training: selected, decontaminated, split by prompt, weighted."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from pipelines.artefacts import ArtefactError, digest, read_table
from pipelines.config import Config
from pipelines.data import normalised, prompt_id, unit_interval
from pipelines.sources import Malformed, read_pairs


def import_pairs(cfg: Config, prompts: Path) -> tuple[dict[str, list[dict]], dict[str, dict[str, int]], Malformed]:
    """Pairs of `rm_train` and `rm_val`, drops by source and reason, and the malformed rows.

    The split follows from the prompt, in the ratio of `data.splits.rm_train` to `rm_val`; all pairs of a prompt share
    it. Pairs whose prompt, compared without case, space and punctuation, stands in the run's evaluation or
    calibration prompts or in `preferences.decontaminate` are left out.

    Raises:
        ArtefactError: more malformed rows in a source than `preferences.max_rejected_share`.
    """
    banned = evaluation_prompts(cfg, prompts)
    share = cfg.data.splits.rm_val / (cfg.data.splits.rm_train + cfg.data.splits.rm_val)
    splits: dict[str, list[dict]] = {"rm_train": [], "rm_val": []}
    dropped, malformed, seen = {}, Malformed(), set()
    for name, source in cfg.preferences.sources.items():
        before, counts, kept = malformed.counts.total(), Counter(), []
        read = untied = 0
        for pair in read_pairs(source, malformed):
            read += 1
            if pair["tie"]:
                counts["tie"] += 1
                continue
            untied += 1
            if (untied - 1) % source.stride:  # counted over pairs without ties, as the GRM authors' 40K and 400K are
                continue
            row = as_row(pair, cfg.data.system)
            if reason := _unwanted(row, seen, banned):
                counts[reason] += 1
                continue
            seen.add(row["pair_id"])
            kept.append(row)
        _check_share(name, cfg, read, malformed, before)
        kept.sort(key=lambda row: unit_interval(row["pair_id"], salt=f"pairs/{cfg.run.seed}"))
        dropped[name] = dict(counts)
        for row in kept[: source.max_pairs]:
            split = "rm_val" if unit_interval(normalised(row["prompt"]), salt="split") < share else "rm_train"
            splits[split].append(row | {"split": split, "weight": source.weight})
    for rows in splits.values():
        rows.sort(key=lambda row: unit_interval(row["pair_id"], salt=f"order/{cfg.run.seed}"))
    return splits, dropped, malformed


def evaluation_prompts(cfg: Config, prompts: Path) -> set[str]:
    """Normalised prompts that no reward model may be trained on."""
    from rm.evalsets import read_set  # rm imports pipelines, so not at the top

    held = {
        normalised(r["prompt"])
        for r in read_table(prompts / "prompts.parquet")
        if r["split"] in ("eval", "calibration")
    }
    for path in cfg.preferences.decontaminate:
        for comparison in read_set(path.stem, path, label_ties="half").comparisons:
            held |= {normalised(chat[:-1]) for chat in (comparison.chosen, comparison.rejected)}
    return held


def as_row(pair: dict, system: str | None = None) -> dict:
    """A pair of `read_pairs` as a row of `pairs.parquet`."""
    prompt = pair["prompt"]
    if system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    identity = prompt_id(prompt)
    return {
        "prompt_id": identity,
        "pair_id": digest([identity, sorted([pair["chosen"], pair["rejected"]])]),
        "source": pair["source"],
        "prompt": prompt,
        "chosen": pair["chosen"],
        "rejected": pair["rejected"],
        "flipped": False,
        "margin": pair["margin"],
        "gold_chosen": None,
        "gold_rejected": None,
    }


def repeated(rows: list[dict]) -> list[dict]:
    """The rows as often as their weight says; of its fraction, the share of pairs that a hash of their id gives."""
    found = []
    for row in rows:
        whole = math.floor(row["weight"])
        extra = unit_interval(row["pair_id"], salt="weight") < row["weight"] - whole
        found += [{k: v for k, v in row.items() if k != "weight"}] * (whole + extra)
    return found


def _unwanted(row: dict, seen: set[str], banned: set[str]) -> str | None:
    if row["pair_id"] in seen:
        return "stands twice"
    return "prompt of an evaluation set" if normalised(row["prompt"]) in banned else None


def _check_share(name: str, cfg: Config, read: int, malformed: Malformed, before: int) -> None:
    bad, asked = malformed.counts.total() - before, cfg.preferences.max_rejected_share
    if not read:
        raise ArtefactError(f"preferences.sources.{name}: no pair; " + ("; ".join(malformed.lines()) or "no rows"))
    if bad > asked * (read + bad):
        raise ArtefactError(
            f"preferences.sources.{name}: {bad} of {read + bad} rows are malformed, more than "
            f"preferences.max_rejected_share {asked:g}: " + "; ".join(malformed.lines())
        )
