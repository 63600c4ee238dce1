"""Published preference data: its layouts, read as pairs of responses to one prompt.

unified  llm-blender/Unified-Feedback: conv_A, conv_B, conv_A_rating, conv_B_rating
trl      chosen, rejected (texts, responses or whole chats, with `prompt` unless they contain it): TRL's preference
         format, Skywork-80K, preference_700K, UltraFeedback-binarized
hh       chosen, rejected as one text of "Human:" and "Assistant:" turns: HH-RLHF
ratings  prompt, response and a rating, several rows per prompt: HelpSteer
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TypedDict

from core.config import PreferenceSource
from core.data.chat import Message, check_prompt, check_unicode, response_of
from core.data.splits import prompt_id
from core.errors import DataError
from core.row_files import numbered_rows

SUMMARISE = "Generate one-sentence summary for the following post: "
"""Put before the first turn of the `summarize` sources of Unified-Feedback, as the GRM authors do, because their rows
hold the post alone."""
RATINGS = ("rating", "score", "helpfulness", "overall_score")
"""Columns of the `ratings` layout, in order of preference."""
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
SUFFIXES = (".jsonl", ".json", ".parquet")
"""Formats of a source; CSV cannot hold messages."""


@dataclass(slots=True)
class Malformed:
    """Rows that cannot be used, counted by reason, with the first three of each."""

    counts: Counter[str] = field(default_factory=Counter)
    """By reason."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> file and number of its first rows."""
    rows: list[dict[str, str]] = field(default_factory=list)
    """Reason and place of each, for `rejected.jsonl`."""
    read: int = 0
    """Rows that could be used."""

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.rows.append({"reason": reason, "where": where})
        if len(rows := self.first.setdefault(reason, [])) < 3:
            rows.append(where)

    def lines(self) -> list[str]:
        return [f"{n} x {reason} ({', '.join(self.first[reason])})" for reason, n in self.counts.most_common()]


class SourcePair(TypedDict):
    """A pair as a source has it, before it is selected and split."""

    prompt: list[Message]
    chosen: str
    rejected: str
    source: str
    """What the row names as its source, else that of the configuration."""
    margin: float | None
    """Rating of chosen minus that of rejected, 0 or more; None without ratings."""
    tie: bool
    """Equal ratings: which response is chosen then means nothing."""
    row: int
    """Line or row of its file, from 1; of two rated responses the later one's."""
    prompt_id: str


def read_pairs(source: PreferenceSource, malformed: Malformed, name: str | None = None) -> Iterator[SourcePair]:
    """Pairs in the order of the rows; rows that make no pair are added to `malformed`.

    Args:
        name: source of the rows that name none themselves, by default the name of the file.

    Raises:
        DataError: nothing at `source.path`, or a layout that is not recognised.
    """
    for file, rows in _tables(source, malformed):
        layout: str | None = source.layout
        if layout == "auto":
            layout, rows = _recognised(rows, file, malformed)
        if layout is None:  # no row at all
            continue
        if layout == "ratings":
            numbered = _rated(rows, file, malformed, name or file)
        else:
            numbered = _each(rows, LAYOUTS[layout], file, malformed, name or file)
        for number, pair in numbered:
            if pair["chosen"] == pair["rejected"]:
                malformed.add("chosen and rejected are identical", f"{file} row {number}")
                malformed.read -= layout != "ratings"  # there a row is one response, which can still be used
            else:
                yield pair | {"row": number, "prompt_id": prompt_id(pair["prompt"])}


def _recognised(rows: Iterator[tuple], file: str, malformed: Malformed) -> tuple[str | None, Iterator[tuple]]:
    """The layout of the first row that has a known one, and the rows from there on; earlier rows are malformed."""
    odd: list[tuple[int, DataError]] = []
    for number, row in rows:
        try:
            layout = recognise(row, file)
        except DataError as error:
            odd.append((number, error))
            continue
        for before, _ in odd:
            malformed.add("columns of no known layout", f"{file} row {before}")
        return layout, _chain((number, row), rows)
    if odd:
        raise odd[0][1]
    return None, iter(())


def recognise(row: dict, where: str) -> str:
    """The layout whose columns a row has; DataError, which lists the known layouts, for other columns."""
    columns = row.keys()
    if {"conv_A", "conv_B"} <= columns:
        return "unified"
    if {"chosen", "rejected"} <= columns:
        texts = [row["chosen"], row["rejected"]]
        dialogue = all(isinstance(t, str) and "Assistant:" in t for t in texts)
        return "hh" if dialogue and not row.get("prompt") else "trl"
    if {"prompt", "response"} <= columns and any(c in columns for c in RATINGS):
        return "ratings"
    raise DataError(
        f"{where}: columns {', '.join(sorted(columns))} are of no known layout; known are conv_A and conv_B; chosen "
        f"and rejected; and prompt, response and one of {', '.join(RATINGS)}"
    )


def _unified(row: dict, name: str) -> dict:
    source = str(row.get("source") or name)
    a, b = _number(row["conv_A_rating"]), _number(row["conv_B_rating"])
    chosen, rejected = (row["conv_A"], row["conv_B"]) if a >= b else (row["conv_B"], row["conv_A"])
    pair = _of_chats(chosen, rejected)
    if "summarize" in source:
        first = pair["prompt"][0]
        pair["prompt"][0] = first | {"content": SUMMARISE + first["content"].strip()}
    return pair | {"source": source, "margin": abs(a - b), "tie": a == b}


def _trl(row: dict, name: str) -> dict:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            raise DataError("chosen and rejected are texts, and there is no prompt")
        pair = _of_answers(prompt, chosen, rejected)
    elif prompt is None or (isinstance(chosen, list) and chosen and chosen[0].get("role") != "assistant"):
        pair = _of_chats(chosen, rejected)  # both begin with the prompt; UltraFeedback-binarized repeats it as a column
    else:
        if len(chosen) != 1 or len(rejected) != 1:
            raise DataError("next to a prompt, chosen and rejected must be one message each")
        pair = _of_answers(prompt, response_of(chosen), response_of(rejected))
    margin = row.get("margin")
    for better, worse in SCORES:
        if margin is None and row.get(better) is not None and row.get(worse) is not None:
            margin = _number(row[better]) - _number(row[worse])
    if margin is not None and _number(margin) < 0:
        raise DataError("the rating of rejected exceeds that of chosen")
    source = str(row.get("source") or name)
    return pair | {"source": source, "margin": None if margin is None else float(margin), "tie": margin == 0}


def _hh(row: dict, name: str) -> dict:
    pair = _of_chats(parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"]))
    return pair | {"source": str(row.get("source") or name), "margin": None, "tie": False}


LAYOUTS: dict[str, Callable[[dict, str], dict]] = {"unified": _unified, "trl": _trl, "hh": _hh}
"""Layouts of one pair per row; `ratings` has several rows per pair."""


def parse_dialogue(text: str) -> list[Message]:
    r"""Messages of `...\n\nAssistant: ...\n\nHuman: ...`; the first turn is the user's, with or without `Human:`."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    parts = ["Human", *parts] if parts[0].strip() else parts[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]  # fmt: skip


def _of_chats(chosen: Any, rejected: Any) -> dict:
    """Prompt and responses of two chats that differ in their last message only."""
    for chat in (chosen, rejected):
        if not isinstance(chat, list) or len(chat) < 2 or not all(isinstance(m, dict) for m in chat):
            raise DataError("a conversation must be a list of at least two messages")
    plain = [[(m.get("role"), m.get("content")) for m in chat[:-1]] for chat in (chosen, rejected)]
    if plain[0] != plain[1]:
        raise DataError("the two conversations have different prompts")
    return _of_answers(chosen[:-1], response_of(chosen), response_of(rejected))


def _of_answers(prompt: object, chosen: str, rejected: str) -> dict:
    messages = check_prompt(_turns(prompt) if isinstance(prompt, str) else prompt)
    if not chosen.strip() or not rejected.strip():
        raise DataError("a response is empty")
    check_unicode(chosen, rejected)
    return {"prompt": messages, "chosen": chosen, "rejected": rejected}


def _turns(prompt: str) -> list[Message]:
    """A prompt given as one text, which has several turns if it is written as in HH-RLHF or HelpSteer2."""
    if re.match(r"\s*Human:", prompt):
        turns = parse_dialogue("\n\n" + prompt.strip())
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)
    turns = [{"role": "user", "content": parts[0]}]
    return turns + [{"role": who.lower(), "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _number(value: Any) -> float:
    number = float("nan") if value is None or isinstance(value, bool) else float(value)
    if not math.isfinite(number):
        raise DataError("a rating is not a finite number")
    return number


def _each(
    rows: Iterable[tuple[int, dict]], read: Callable, file: str, malformed: Malformed, name: str
) -> Iterator[tuple]:
    for number, row in rows:
        if (pair := _tried(read, row, name, f"{file} row {number}", malformed)) is not None:
            yield number, pair


def _rated(rows: Iterable[tuple[int, dict]], file: str, malformed: Malformed, name: str) -> Iterator[tuple]:
    """Every two rated responses to a prompt; the number is that of the later row."""
    prompts: dict[str, list[tuple]] = {}
    for number, row in rows:
        read = _tried(_rating, row, name, f"{file} row {number}", malformed)
        if read is not None:
            prompts.setdefault(prompt_id(read[0]), []).append((number, *read))
    for group in prompts.values():
        for first, second in combinations(group, 2):
            better, worse = (first, second) if first[3] >= second[3] else (second, first)
            margin = better[3] - worse[3]
            yield second[0], {
                "prompt": better[1], "chosen": better[2], "rejected": worse[2], "source": better[4], "margin": margin,
                "tie": margin == 0,
            }  # fmt: skip


def _rating(row: dict, name: str) -> tuple[list[Message], str, float, str]:
    column = next((c for c in RATINGS if c in row), None)
    if column is None:
        raise DataError(f"none of the columns {', '.join(RATINGS)}")
    pair = _of_answers(row["prompt"], row["response"], row["response"])
    return pair["prompt"], row["response"], _number(row[column]), str(row.get("source") or name)


def _tried(read: Callable, row: dict, name: str, where: str, malformed: Malformed):
    """What `read` makes of a row; None if it refuses the row, with the reason in `malformed`."""
    try:
        result = read(row, name)
        malformed.read += 1
        return result
    except KeyError as error:
        malformed.add(f"no column {error.args[0]!r}", where)
    except DataError as error:
        malformed.add(str(error), where)
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        malformed.add(f"a column of another type ({error})", where)


def _tables(source: PreferenceSource, malformed: Malformed) -> Iterator[tuple[str, Iterator[tuple[int, dict]]]]:
    """Name and numbered rows of each file of the source, or of a split on the hub if no such path exists."""
    path = source.path
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.name != "dataset_infos.json")
        files = [p for p in files if p.stem.startswith(source.split)] or files  # as the hub lays out its splits
    else:
        files = [path] if path.is_file() else []
    if files:
        yield from ((file.stem, _rows(file, malformed)) for file in files)
    elif path.exists() or path.is_absolute() or len(path.parts) != 2:
        raise DataError(
            f"{path}: neither a {', '.join(SUFFIXES)} file, nor a folder of such files, nor a hub id (owner/name)"
        )
    else:
        from datasets import load_dataset

        try:
            rows = load_dataset(str(path), source.subset, split=source.split, revision=source.revision)
        except Exception as error:  # of any kind that the hub client raises: its message needs the option
            raise DataError(
                f"{path}: no such file or folder, and the hub gives no split {source.split!r} of it: {error}"
            ) from None
        yield path.name, iter(enumerate(rows, start=1))


def _rows(file: Path, malformed: Malformed) -> Iterator[tuple[int, dict]]:
    """Numbered rows of a file; those that cannot be read are added to `malformed`."""
    return numbered_rows(file, lambda number, fault: malformed.add(fault, f"{file.stem} row {number}"))


def _chain(first: tuple, rest: Iterator[tuple]) -> Iterator[tuple]:
    yield first
    yield from rest
