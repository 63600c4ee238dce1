"""Imported preference pairs made ready for training: selected, decontaminated, split by prompt, weighted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from core.config import Config
from core.data.sources import Malformed, read_pairs
from core.data.splits import normalised, opening, prompt_id
from core.data.streams import unit_interval
from core.errors import ArtefactError
from core.files import digest, read_table, write_jsonl
from rm.evaluation.sets import read_set

CONTRADICTED = "a copy prefers the other response"
"""Neither copy is used: which of them is wrong is not known."""


def import_pairs(
    cfg: Config, prompts: Path, out: Path | None = None
) -> tuple[dict[str, list[dict]], dict[str, dict[str, int]], Malformed]:
    """Pairs of `rm_train` and `rm_val`, drops by source and reason, and the malformed rows.

    The split follows from the first user turn, in the ratio of `data.splits.rm_train` to `rm_val`: the answers of one
    pair stand in the prompts of others that go on from it. Pairs whose prompt, or the part of it up to any user turn,
    is one of the run's evaluation or calibration prompts or of `preferences.decontaminate`, compared without case,
    space and punctuation, are left out.

    Raises:
        ArtefactError: no share for one of the splits, a source without pairs, or with more malformed rows than
            `preferences.max_rejected_share`; they are in `out/rejected.jsonl` by then.
    """
    banned = evaluation_prompts(cfg, prompts)
    asked = cfg.data.splits
    if not asked.rm_train or not asked.rm_val:
        raise ArtefactError("data.splits.rm_train and rm_val also divide imported pairs: set both above 0")
    share = asked.rm_val / (asked.rm_train + asked.rm_val)
    splits: dict[str, list[dict]] = {"rm_train": [], "rm_val": []}
    malformed, bad = Malformed(), {}
    dropped: dict[str, Counter] = {}
    seen: dict[str, tuple[str, str]] = {}  # pair -> the response it prefers, and its source
    contradicted: set[str] = set()
    for name, source in cfg.preferences.sources.items():
        before, counts, kept = (malformed.counts.total(), malformed.read), dropped.setdefault(name, Counter()), []
        untied = 0
        for pair in read_pairs(source, malformed, name):
            if pair["tie"]:
                counts["tie"] += 1
                continue
            untied += 1
            if (untied - 1) % source.stride:  # counted over pairs without ties, as the GRM authors' 40K and 400K are
                continue
            row = as_row(pair, cfg.data.system)
            if reason := _unwanted(row, seen, banned):
                counts[reason] += 1
                contradicted |= {row["pair_id"]} if reason == CONTRADICTED else set()
                continue
            seen[row["pair_id"]] = row["chosen"], name
            kept.append(row)
        wrong, read = malformed.counts.total() - before[0], malformed.read - before[1]
        if not read:
            raise ArtefactError(f"preferences.sources.{name}: no pair; " + ("; ".join(malformed.lines()) or "no rows"))
        bad[name] = (wrong, read)
        kept.sort(key=lambda row: unit_interval(row["pair_id"], salt=f"pairs/{cfg.run.seed}"))
        for row in kept[: source.max_pairs]:
            split = "rm_val" if unit_interval(opening(row["prompt"]), salt="split") < share else "rm_train"
            splits[split].append(row | {"split": split, "weight": source.weight})
    if out is not None:  # before the shares are judged: the user who is told of too many wants to see them
        write_jsonl(out / "rejected.jsonl", malformed.rows)
    check_shares(cfg, bad, malformed)
    for pair in contradicted:
        dropped[seen[pair][1]][CONTRADICTED] += 1
    for split, rows in splits.items():
        splits[split] = rows = [row for row in rows if row["pair_id"] not in contradicted]
        rows.sort(key=lambda row: unit_interval(row["pair_id"], salt=f"order/{cfg.run.seed}"))
    return splits, {name: dict(counts) for name, counts in dropped.items()}, malformed


def evaluation_prompts(cfg: Config, prompts: Path) -> set[str]:
    """Normalised prompts that no reward model may be trained on."""
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


def _unwanted(row: dict, seen: dict[str, tuple[str, str]], banned: set[str]) -> str | None:
    if row["pair_id"] in seen:
        return "stands twice" if seen[row["pair_id"]][0] == row["chosen"] else CONTRADICTED
    prompt = row["prompt"]
    parts = (prompt[: i + 1] for i, m in enumerate(prompt) if m["role"] == "user")
    return "prompt of an evaluation set" if any(normalised(part) in banned for part in parts) else None


def check_shares(cfg: Config, bad: dict[str, tuple[int, int]], malformed: Malformed) -> None:
    """ArtefactError when a source has more malformed rows than `preferences.max_rejected_share`.

    Args:
        bad: source -> (malformed rows, rows that could be used).
    """
    asked = cfg.preferences.max_rejected_share
    for name, (wrong, read) in bad.items():
        if wrong > asked * (read + wrong):
            raise ArtefactError(
                f"preferences.sources.{name}: {wrong} of {read + wrong} rows are malformed, more than "
                f"preferences.max_rejected_share {asked:g}: " + "; ".join(malformed.lines())
            )
