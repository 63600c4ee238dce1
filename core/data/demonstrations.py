"""Demonstrations, for supervised fine-tuning: prompts and answers in the columns that published sets have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, TypedDict

from core.config import PreferenceSource, Sft
from core.data.chat import Message
from core.data.layouts.messages import is_filled
from core.data.layouts.pairing import Answers, Draft, complete
from core.data.layouts.readers import PROMPTS, asked, said
from core.data.layouts.table import LAYOUTS
from core.data.sources import table_pairs, tried
from core.data.tables import Malformed, Table, source_tables
from core.errors import DataError

ANSWERS = ("completion", "response", "output", "answer")
"""Columns of an answer, in order of preference: TRL's prompt-completion, then what instruction sets call it."""
CHATS = ("messages", "conversations")
"""Columns of a whole conversation, in order of preference."""


class Demonstration(TypedDict):
    prompt: list[Message]
    response: str
    source: str
    row: int
    """Line or row of its file, from 1."""


def read_demonstrations(sft: Sft, malformed: Malformed) -> Iterator[Demonstration]:
    """Demonstrations in the order of the rows; rows that make none are added to `malformed`.

    Of preference pairs, in any layout of `core.data.layouts`, the chosen response is taken, unless the two are tied.

    Raises:
        DataError: nothing at `sft.data`, or rows with neither an answer nor a conversation nor a pair.
    """
    source = PreferenceSource(path=sft.data, subset=sft.subset, split=sft.split, revision=sft.revision)
    for table in source_tables(source, malformed):
        first = next(table.rows, None)
        if first is None:
            continue
        whole = table._replace(rows=chain([first], table.rows))
        if any(layout.fits(first[1]) for layout in LAYOUTS.values()):
            yield from _chosen(whole, malformed)
        elif _has_demonstration(first[1]):
            yield from _each(whole, malformed)
        else:
            raise DataError(
                f"{table.file} row {first[0]}: columns {', '.join(sorted(first[1]))} are no demonstration: give a "
                f"prompt ({', '.join(PROMPTS)}) with an answer ({', '.join(ANSWERS)}), a conversation "
                f"({', '.join(CHATS)}), or preference pairs (docs/data.md)"
            )


def _chosen(table: Table, malformed: Malformed) -> Iterator[Demonstration]:
    for pair in table_pairs(table, malformed):
        if pair["tie"]:
            malformed.changed["tie left out"] += 1
            continue
        yield {"prompt": pair["prompt"], "response": pair["chosen"], "source": pair["source"], "row": pair["row"]}


def _has_demonstration(row: dict[str, Any]) -> bool:
    return any(name in row for name in CHATS) or (asked(row) is not None and any(name in row for name in ANSWERS))


def _each(table: Table, malformed: Malformed) -> Iterator[Demonstration]:
    for number, row in table.rows:
        notes: list[str] = []
        found, fault = tried(_answered, row, notes)
        if found is None:
            malformed.add(str(fault), f"{table.file} row {number}")
            continue
        malformed.read += 1
        malformed.changed.update(set(notes))
        source = str(row.get("source") or table.name)
        yield {"prompt": found.prompt, "response": found.chosen, "source": source, "row": number}


def _answered(row: dict[str, Any], notes: list[str]) -> Answers:
    """The prompt and the answer of a row. Both sides of a pair are given its one answer, so that what is checked of
    pairs is checked of it."""
    answer = next((name for name in ANSWERS if is_filled(row.get(name))), None)
    chat = next((name for name in CHATS if is_filled(row.get(name))), None)
    if answer is not None:
        draft = Draft(asked(row), said(row, answer), said(row, answer))
        return complete(draft, row, (*PROMPTS, answer), notes)
    if chat is not None:
        draft = Draft(None, said(row, chat), said(row, chat))
        return complete(draft, row, CHATS, notes)
    raise DataError(f"no answer (none in {', '.join((*ANSWERS, *CHATS))})")
