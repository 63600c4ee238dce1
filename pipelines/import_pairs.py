"""Imported preference pairs made ready for training: selected, decontaminated, split by prompt, weighted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from core.config import Data, Preferences, Splits
from core.data.chat import with_system
from core.data.rows import PairRow
from core.data.sources import SourcePair, read_pairs
from core.data.splits import begins_with, held_out_prompts, normalised, opening, pair_id, prompt_id
from core.data.streams import unit_interval
from core.data.tables import Malformed
from core.errors import ArtefactError
from core.files import write_jsonl
from rm.evaluation.sets import read_set

DUPLICATE = "duplicate"
CONTRADICTED = "a copy prefers the other response"
"""Neither copy is used, as it is not known which of them is wrong."""


class Imported(NamedTuple):
    pairs: dict[str, list[PairRow]]
    """Of rm_train and of rm_val, in the order of the run."""
    dropped: dict[str, dict[str, int]]
    """Source -> reason -> pairs that are not used."""
    malformed: Malformed
    """Also what was done to rows that are used, and the columns that nothing was read from."""


def import_pairs(
    preferences: Preferences, data: Data, *, prompts: Path, seed: int, out: Path | None = None
) -> Imported:
    """The pairs of `preferences.sources`.

    The split follows from the first user turn, in the ratio of `data.splits.rm_train` to `rm_val`, because the prompt
    of one pair may continue the conversation of another. Pairs are left out whose prompt, or its beginning up to any
    user turn, is an evaluation or calibration prompt of the run or a prompt of `preferences.decontaminate`. Prompts are
    compared without case, space and punctuation.

    Args:
        prompts: folder of stage `prompts`.
        out: folder for `rejected.jsonl`, the malformed rows.

    Raises:
        ArtefactError: no share for one of the splits, a source without pairs, or one with more malformed rows than
            `preferences.max_rejected_share`; `rejected.jsonl` is written before.
    """
    banned = evaluation_prompts(prompts, preferences.decontaminate)
    val_share = _val_share(data.splits)
    splits: dict[str, list[PairRow]] = {"rm_train": [], "rm_val": []}
    malformed, rows_of = Malformed(), {}
    dropped: dict[str, Counter[str]] = {}
    seen: dict[str, tuple[str, str]] = {}  # pair -> the response it prefers, and its source
    contradicted: set[str] = set()
    for name, source in preferences.sources.items():
        before, counts, kept = (malformed.counts.total(), malformed.read), dropped.setdefault(name, Counter()), []
        for pair in _strided(read_pairs(source, malformed, name), source.stride, counts):
            split = "rm_val" if unit_interval(opening(pair["prompt"]), salt="split") < val_share else "rm_train"
            row = as_row(pair, system=data.system, split=split, weight=source.weight)
            if reason := _unwanted(row, seen, banned):
                counts[reason] += 1
                contradicted |= {row["pair_id"]} if reason == CONTRADICTED else set()
                continue
            seen[row["pair_id"]] = row["chosen"], name
            kept.append(row)
        rows_of[name] = malformed.counts.total() - before[0], malformed.read - before[1]
        if not rows_of[name][1]:
            why = [*malformed.lines(), *(f"{n} x {done}" for done, n in malformed.changed.items())]
            raise ArtefactError(f"preferences.sources.{name}: no pair; " + ("; ".join(why) or "no rows"))
        kept.sort(key=lambda row: unit_interval(row["pair_id"], salt=f"pairs/{seed}"))
        for row in kept[: source.max_pairs]:
            splits[row["split"]].append(row)
    if out is not None:  # before the shares are checked: whoever reads that there are too many wants to see them
        write_jsonl(out / "rejected.jsonl", malformed.rows)
    check_shares(rows_of, preferences.max_rejected_share, malformed)
    for identity in contradicted:
        dropped[seen[identity][1]][CONTRADICTED] += 1
    for split, rows in splits.items():
        splits[split] = rows = [row for row in rows if row["pair_id"] not in contradicted]
        rows.sort(key=lambda row: unit_interval(row["pair_id"], salt=f"order/{seed}"))
    return Imported(splits, {name: dict(counts) for name, counts in dropped.items()}, malformed)


def _val_share(splits: Splits) -> float:
    if not splits.rm_train or not splits.rm_val:
        raise ArtefactError("data.splits.rm_train and rm_val also divide imported pairs: set both above 0")
    return splits.rm_val / (splits.rm_train + splits.rm_val)


def evaluation_prompts(prompts: Path, decontaminate: Sequence[Path]) -> set[str]:
    """Normalised prompts that no reward model may be trained on.

    Args:
        prompts: folder of stage `prompts`.
        decontaminate: evaluation sets, as `grm rm-eval --set` reads them.
    """
    banned = held_out_prompts(prompts)
    for path in decontaminate:
        for comparison in read_set(path.stem, path, label_ties="half").comparisons:
            banned |= {normalised(chat[:-1]) for chat in (comparison.chosen, comparison.rejected)}
    return banned


def as_row(pair: SourcePair, *, system: str | None = None, split: str = "rm_val", weight: float = 1.0) -> PairRow:
    """A pair of a source as a row of `pairs.parquet`, with the system message `system` where it has none."""
    prompt = with_system(pair["prompt"], system)
    identity = prompt_id(prompt)
    return {
        "prompt_id": identity,
        "pair_id": pair_id(identity, [pair["chosen"], pair["rejected"]]),
        "source": pair["source"],
        "prompt": prompt,
        "chosen": pair["chosen"],
        "rejected": pair["rejected"],
        "flipped": False,
        "margin": pair["margin"],
        "gold_chosen": None,
        "gold_rejected": None,
        "split": split,
        "weight": weight,
    }


def _strided(pairs: Iterable[SourcePair], stride: int, counts: Counter[str]) -> Iterator[SourcePair]:
    """The pairs of every `stride`-th row that is no tie, as the 40K and 400K of the GRM authors; ties are counted.

    Rows that cannot be used count as well: left out of the count, all later pairs would be other ones than theirs.
    """
    for pair in pairs:
        if pair["tie"]:
            counts["tie"] += 1
        elif pair["place"] % stride == 0:
            yield pair


def _unwanted(row: PairRow, seen: Mapping[str, tuple[str, str]], banned: set[str]) -> str | None:
    """Why a pair is not used; None when it is."""
    if row["pair_id"] in seen:
        return DUPLICATE if seen[row["pair_id"]][0] == row["chosen"] else CONTRADICTED
    return "prompt of an evaluation set" if begins_with(row["prompt"], banned) else None


def check_shares(rows_of: Mapping[str, tuple[int, int]], most: float, malformed: Malformed) -> None:
    """ArtefactError when the share of malformed rows of a source is above `most`.

    Args:
        rows_of: source -> (malformed rows, rows that could be used).
    """
    for name, (wrong, read) in rows_of.items():
        if wrong > most * (read + wrong):
            raise ArtefactError(
                f"preferences.sources.{name}: {wrong} of {read + wrong} rows are malformed, more than "
                f"preferences.max_rejected_share {most:g}: " + "; ".join(malformed.lines())
            )
