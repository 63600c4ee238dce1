"""Published preference data, read as pairs of responses to one prompt. `core.data.layouts` has its layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, combinations, count, islice
from typing import Any, NamedTuple, TypedDict, TypeVar

from core.config import PreferenceSource
from core.data.chat import Message
from core.data.layouts.pairing import Answers, Draft, Rated, complete, repeats_prompt
from core.data.layouts.table import LAYOUTS, Layout, recognise, unread_columns
from core.data.splits import prompt_id
from core.data.tables import Malformed, Table, source_tables
from core.errors import DataError

AHEAD = 200
"""Rows of a file by which it is decided whether its answers repeat their prompts."""
Result = TypeVar("Result")
Rows = Iterator[tuple[int, dict[str, Any]]]


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
    place: int
    """Number of its row in the source, from 0, ties not counted: all pairs of a row have one number, and rows that
    cannot be used are counted. A pair that is made of two rows has a number of its own. -1 for a tie. `stride` keeps
    the pairs whose number is a multiple of it, as the GRM authors do."""
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
    places = count()
    for table in source_tables(source, malformed):
        yield from table_pairs(table, malformed, layout=source.layout, name=name, places=places)


def table_pairs(
    table: Table,
    malformed: Malformed,
    *,
    layout: str = "auto",
    name: str | None = None,
    places: Iterator[int] | None = None,
) -> Iterator[SourcePair]:
    """Pairs of one table.

    Args:
        layout: one of LAYOUTS, or auto: that of the first row that has a known one.
        name: source of the rows that name none themselves, by default the name of the table.
        places: what numbers the rows that are no ties, over the tables of a source.
    """
    known, rows = LAYOUTS.get(layout), table.rows
    if known is None:
        known, rows = _recognised(table, malformed)
    if known is None:  # no row at all
        return
    ahead = list(islice(rows, AHEAD))
    reading = _Reading(
        table.file,
        known,
        name or table.name,
        malformed,
        places or count(),
        repeats=_repeat_prompts(ahead, known),
        named=layout in LAYOUTS,
    )
    rows = chain(ahead, rows)
    yield from _rated(rows, reading) if known.rated else _each(rows, reading)


class _Reading(NamedTuple):
    """What is known of the table that is read."""

    file: str
    layout: Layout
    name: str
    malformed: Malformed
    places: Iterator[int]
    repeats: bool
    """Whether its answers repeat their prompts."""
    named: bool
    """Whether the layout was named and not recognised. All rows then have to fit it; else a dialogue and a text with a
    prompt may stand in one file."""

    def where(self, number: int) -> str:
        return f"{self.file} row {number}"

    def drafts(self, row: dict[str, Any]) -> list[Draft]:
        if self.named:
            self.layout.check(row)
        return self.layout.read(row)

    def complete(self, draft: Draft, row: dict[str, Any], notes: list[str]) -> Answers:
        return complete(draft, row, self.layout.columns, notes, repeats=self.repeats)

    def used(self, row: dict[str, Any], notes: Iterable[str]) -> None:
        self.malformed.read += 1
        self.malformed.changed.update(set(notes))
        self.malformed.unread |= unread_columns(row, self.layout)


def _recognised(table: Table, malformed: Malformed) -> tuple[Layout | None, Rows]:
    """The layout of the first row that has a known one, and the rows from there on; earlier rows are malformed."""
    odd: list[tuple[int, DataError]] = []
    for number, row in table.rows:
        try:
            layout = recognise(row, table.file)
        except DataError as error:
            odd.append((number, error))
            continue
        for before, _ in odd:
            malformed.add("columns of no known layout", f"{table.file} row {before}")
        return layout, chain([(number, row)], table.rows)
    if odd:
        raise odd[0][1]
    return None, iter(())


def _repeat_prompts(ahead: list[tuple[int, dict[str, Any]]], layout: Layout) -> bool:
    """Whether at least half of the pairs of texts in these rows have their prompt at the beginning of both answers."""
    if layout.rated:
        return False
    drafts = [draft for _, row in ahead for draft in tried(layout.read, row)[0] or []]
    repeated = [r for draft in drafts if (r := repeats_prompt(draft)) is not None]
    return bool(repeated) and sum(repeated) >= len(repeated) / 2


def _each(rows: Rows, reading: _Reading) -> Iterator[SourcePair]:
    for number, row in rows:
        drafts, fault = tried(reading.drafts, row)
        if drafts is not None and not drafts:
            fault = "fewer than two answers"
        if fault is not None or drafts is None:
            next(reading.places)
            reading.malformed.add(str(fault), reading.where(number))
            continue
        yield from _of_row(number, row, drafts, reading)


def _of_row(number: int, row: dict[str, Any], drafts: list[Draft], reading: _Reading) -> Iterator[SourcePair]:
    """The pairs of a row. Where it makes none, the row is malformed; where it makes several, a pair that cannot be used
    is counted only."""
    pairs: list[SourcePair] = []
    faults: list[str] = []
    notes: list[str] = []
    place = -1 if all(draft.tie for draft in drafts) else next(reading.places)
    for draft in drafts:
        answers, fault = tried(lambda: reading.complete(draft, row, notes))  # noqa: B023, called at once
        if answers is not None and answers.chosen == answers.rejected:
            fault = "the two answers are equal"
        if answers is None or fault is not None:
            faults.append(str(fault))
            continue
        pairs.append(_pair(answers, draft, _source(row, reading.name), number, -1 if draft.tie else place))
    if pairs:
        reading.used(row, [*notes, *(f"one pair of several left out: {fault}" for fault in faults)])
    else:
        reading.malformed.add(faults[0], reading.where(number))
    yield from pairs


class _Response(NamedTuple):
    number: int
    prompt: list[Message]
    text: str
    rating: float
    source: str


def _rated(rows: Rows, reading: _Reading) -> Iterator[SourcePair]:
    """Every two rated responses to a prompt; the number is that of the later row."""
    prompts: dict[str, list[_Response]] = {}
    for number, row in rows:
        response, fault = tried(lambda: _response(number, row, reading))  # noqa: B023, called at once
        if response is None:
            reading.malformed.add(str(fault), reading.where(number))
        else:
            prompts.setdefault(prompt_id(response.prompt), []).append(response)
    binary = reading.layout.name == "kto"
    for group in prompts.values():
        if binary and len({response.rating for response in group}) < 2:
            _refuse(group, "one answer a row: pairs only where a prompt has both labels", reading)
            continue
        if len(group) == 1:
            reading.malformed.changed["only response to its prompt left out"] += 1
        for first, second in combinations(group, 2):
            better, worse = (first, second) if first.rating >= second.rating else (second, first)
            margin = better.rating - worse.rating
            if better.text == worse.text:
                reading.malformed.changed["pair of equal responses left out"] += 1
            elif not binary or margin:  # two answers with one label are no pair, and no tie
                draft = Draft(None, None, None, None if binary else margin, margin == 0)
                answers = Answers(better.prompt, better.text, worse.text)
                place = -1 if draft.tie else next(reading.places)
                yield _pair(answers, draft, better.source, second.number, place)


def _response(number: int, row: dict[str, Any], reading: _Reading) -> _Response:
    rated: Rated = reading.layout.read(row)
    notes: list[str] = []
    answers = reading.complete(Draft(rated.prompt, rated.response, rated.response), row, notes)
    reading.used(row, notes)
    return _Response(number, answers.prompt, answers.chosen, rated.rating, _source(row, reading.name))


def _refuse(group: list[_Response], reason: str, reading: _Reading) -> None:
    for response in group:
        reading.malformed.read -= 1
        reading.malformed.add(reason, reading.where(response.number))


def _pair(answers: Answers, draft: Draft, source: str, number: int, place: int) -> SourcePair:
    return {
        "prompt": answers.prompt,
        "chosen": answers.chosen,
        "rejected": answers.rejected,
        "source": source,
        "margin": draft.margin,
        "tie": draft.tie,
        "place": place,
        "row": number,
        "prompt_id": prompt_id(answers.prompt),
    }


def _source(row: dict[str, Any], name: str) -> str:
    own = row.get("source")
    return ", ".join(map(str, own)) if isinstance(own, list) else str(own or name)


def tried(read: Callable[..., Result], *arguments: Any) -> tuple[Result | None, str | None]:
    """What `read` returns, and None; or None, and why it refuses the row."""
    try:
        return read(*arguments), None
    except KeyError as error:
        return None, f"no column {error.args[0]!r}"
    except DataError as error:
        return None, str(error)
    except (TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        return None, f"a column of another type ({error})"
