"""Evaluation sets of reward models: files in their published layouts -> comparisons of two conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from core.data.chat import Message, conversation
from core.data.layouts.messages import as_messages, refuse_unusable
from core.data.layouts.pairing import with_context
from core.data.layouts.readers import winner
from core.data.layouts.text import parse_dialogue
from core.data.sources import table_pairs
from core.data.splits import prompt_id
from core.data.tables import Malformed, Table, local_tables
from core.errors import DataError
from core.files import digest
from core.row_files import SUFFIXES
from rm.evaluation.benchmark_scores import REWARDBENCH2_SUBSETS, REWARDBENCH_SECTIONS, RM_BENCH_DOMAINS, STYLES

MAX_MALFORMED = 0.01
LabelTies = Literal["drop", "half"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two conversations that end with the assistant; their prompts may differ in chats of several turns."""

    id: str
    """Unique within its set."""
    subset: str
    prompt_id: str
    """Comparisons that share it are not independent."""
    chosen: list[Message]
    rejected: list[Message]
    item: str
    """Of the benchmark; comparisons of one item share it."""
    chosen_index: int = 0
    """Which chosen response of the item; in RM-Bench its style."""
    rejected_index: int = 0
    label_tie: bool = False
    """The judges saw no difference, so which of the two is chosen means nothing."""


@dataclass(frozen=True, slots=True)
class EvalSet:
    name: str
    layout: str
    comparisons: list[Comparison]
    rows: int
    """Number of rows in the files, those that cannot be used included."""
    label_ties: int
    """Number of rows (of pairs, where a row has several) whose labels tie, dropped or not."""
    malformed: Malformed


def read_set(
    name: str, path: Path, layout: str = "auto", *, label_ties: LabelTies = "drop", max_malformed: float = MAX_MALFORMED
) -> EvalSet:
    """The set in `path`, a file or a folder of files, whichever splits they are.

    Args:
        layout: one of `LAYOUTS`, or auto: detected from the columns of the first row.
        label_ties: drop the rows whose labels tie, or keep them, to count 1/2.

    Raises:
        ArtefactError: a file that cannot be read.
        DataError: no such file, an unknown layout, nothing to compare, an item in two files, or a larger share of
            malformed rows than `max_malformed`.
    """
    malformed, items = Malformed(), []
    for table in _tables(path, malformed):
        first = next(table.rows, None)
        if first is None:
            continue
        known = recognise(first[1], path, table.name) if layout == "auto" else layout
        if known not in LAYOUTS:
            raise DataError(f"--set {name}:{layout}: no such layout; known are {', '.join(LAYOUTS)}")
        layout = known  # the other files of a folder are taken to be like the first
        table = table._replace(rows=chain([first], table.rows))
        reader = LAYOUTS[known]
        parsed = _parse(table, reader, malformed) if reader else _pairs(table, malformed)
        items += [(Path(table.file), item) for item in parsed]
    bad = malformed.counts.total()
    rows = malformed.read + bad
    if bad > max_malformed * rows:
        raise DataError(
            f"{path}: {bad} of {rows} rows do not fit the layout {layout}, more than --max-malformed "
            f"{max_malformed:g}: " + "; ".join(malformed.lines())
        )
    ties = sum(item[0].label_tie for _, item in items)
    if label_ties == "drop":
        items = [(file, item) for file, item in items if not item[0].label_tie]
    if not items:
        raise DataError(f"{path}: no comparison among {rows} rows (layout {layout}, {ties} of them ties)")
    return EvalSet(name, layout, _unique(items), rows, ties, malformed)


def recognise(row: dict, path: Path, stem: str) -> str:
    """The layout whose columns `row` has; `pairs` for any other.

    Args:
        path: of the set, for the message.
        stem: of the file that the row is in; RM-Bench's own files are named after their domain.

    Raises:
        DataError: lists of responses that may be of RM-Bench or of RewardBench 2.
    """
    columns, subset = row.keys(), str(row.get("subset"))
    strings = lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)  # noqa: E731
    if {"input", "targets"} <= columns:
        return "hhh"
    arena = str(row.get("judge")).startswith("arena")  # there `turn` is the number of turns, and all of them count
    if {"conversation_a", "conversation_b", "winner", "turn", "question_id"} <= columns and not arena:
        return "mt_bench"
    if {"response_1", "response_2", "winner"} <= columns or {"sampled_conflict_pairs", "scores"} <= columns:
        return "ppe"
    if strings(row.get("chosen")) and strings(row.get("rejected")):
        if "domain" in columns or subset not in REWARDBENCH2_SUBSETS and _file_domain(stem):
            return "rm_bench"
        if subset in REWARDBENCH2_SUBSETS:
            return "rewardbench2"
        raise DataError(
            f"{path}: lists of responses, but neither a column `domain` or a file named after a domain of RM-Bench "
            f"({', '.join(RM_BENCH_DOMAINS)}), nor a `subset` of RewardBench 2 ({', '.join(REWARDBENCH2_SUBSETS)}): "
            "name the layout, as in NAME:rewardbench2=PATH"
        )
    if isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), str):
        known = {subset for section in REWARDBENCH_SECTIONS.values() for subset in section}
        if subset in known:
            return "rewardbench"
    return "pairs"


def _hhh(row: dict, stem: str, number: int) -> list[Comparison]:
    targets = row["targets"]
    choices, labels = targets["choices"], list(targets["labels"])
    if len(choices) != 2 or sorted(labels) != [0, 1]:
        raise DataError("targets must be two choices with the labels 0 and 1")
    chosen = labels.index(1)
    prompt = _prompt(parse_dialogue(row["input"]), row)
    return [_answered(f"{stem}:{number}", stem, prompt, choices[chosen], choices[1 - chosen])]


def _mt_bench(row: dict, stem: str, number: int) -> list[Comparison]:
    """Turn 1 is judged by the first responses alone, turn 2 by the whole chats."""
    turn, judge = row["turn"], str(row.get("judge", ""))
    if turn not in (1, 2):
        raise DataError("turn is neither 1 nor 2")
    sides = {side: _chat(row[f"conversation_{side[-1]}"]) for side in ("model_a", "model_b")}
    if any(len(chat) < 2 * turn for chat in sides.values()):
        raise DataError("a conversation ends before the judged turn")
    sides = {side: chat[: 2 * turn] for side, chat in sides.items()}
    chosen, rejected, tie = winner(row["winner"])
    subset = f"{'gpt-4' if 'gpt' in judge else 'human'}, turn {turn}"
    identity = f"{row['question_id']}/{turn}/{row.get('model_a')}/{row.get('model_b')}/{judge}"
    question = f"question {row['question_id']}"  # both turns of a question, with any responses
    return [Comparison(identity, subset, question, sides[chosen], sides[rejected], identity, label_tie=tie)]


def _ppe(row: dict, stem: str, number: int) -> list[Comparison]:
    """A row of human preferences; or of correctness, with many responses and pairs of a right and a wrong one."""
    if "sampled_conflict_pairs" in row:
        return _ppe_correctness(row, stem, number)
    responses = {"model_a": row["response_1"], "model_b": row["response_2"]}
    chosen, rejected, tie = winner(row["winner"])
    subset = str(row.get("subset") or stem)
    texts = responses[chosen], responses[rejected]
    comparison = _answered(_id(row, stem, number), subset, _prompt(row["prompt"], row), *texts)
    return [replace(comparison, label_tie=tie)]


def _ppe_correctness(row: dict, stem: str, number: int) -> list[Comparison]:
    prompt, identity, scores, found = _prompt(row["prompt"], row), _id(row, stem, number), list(row["scores"]), []
    for pair in row["sampled_conflict_pairs"]:
        right, wrong = sorted(map(int, pair), key=lambda i: scores[i], reverse=True)
        if scores[right] == scores[wrong]:
            raise DataError(f"the responses {right} and {wrong} of a conflict pair have one score")
        texts = row[f"response_{right + 1}"], row[f"response_{wrong + 1}"]
        compared = _answered(f"{identity}/{right}-{wrong}", stem, prompt, *texts)
        found.append(replace(compared, item=identity, chosen_index=right, rejected_index=wrong))
    if not found:
        raise DataError("no conflict pair")
    return found


def _rewardbench(row: dict, stem: str, number: int) -> list[Comparison]:
    prompt = _prompt(row["prompt"], row)
    return [_answered(_id(row, stem, number), row["subset"], prompt, row["chosen"], row["rejected"])]


def _rewardbench2(row: dict, stem: str, number: int) -> list[Comparison]:
    return _crossed(row, _id(row, stem, number), row["subset"])


def _rm_bench(row: dict, stem: str, number: int) -> list[Comparison]:
    if len(row["chosen"]) != STYLES or len(row["rejected"]) != STYLES:
        raise DataError(f"not {STYLES} chosen and {STYLES} rejected responses")
    domain = row.get("domain") or _file_domain(stem)
    if domain is None:
        raise DataError(
            f"no column `domain`, and the file is named after none of the domains {', '.join(RM_BENCH_DOMAINS)}"
        )
    return _crossed(row, _id(row, stem, number), domain)


def _file_domain(stem: str) -> str | None:
    """The domain of a file of RM-Bench that holds one domain, such as `safety-refuse_filtered`."""
    return next((domain for domain in RM_BENCH_DOMAINS if re.fullmatch(rf"{domain}(_.*)?", stem)), None)


LAYOUTS: dict[str, Callable[[dict, str, int], list[Comparison]] | None] = {
    "hhh": _hhh, "mt_bench": _mt_bench, "rewardbench": _rewardbench, "rewardbench2": _rewardbench2,
    "rm_bench": _rm_bench, "ppe": _ppe, "pairs": None,
}  # fmt: skip
"""Layout -> comparisons of a row, given the stem of its file and its number; core.data.sources reads `pairs`."""


def _crossed(row: dict, identity: str, subset: str) -> list[Comparison]:
    """Each chosen response of a row with each rejected one."""
    if not row["chosen"] or not row["rejected"]:
        raise DataError("no chosen or no rejected response")
    prompt = _prompt(row["prompt"], row)
    chosen, rejected = ([_answer(prompt, text) for text in row[side]] for side in ("chosen", "rejected"))
    about: dict[str, Any] = {"subset": str(subset), "prompt_id": prompt_id(prompt), "item": identity}
    return [
        Comparison(f"{identity}/{i}-{j}", chosen=a, rejected=b, chosen_index=i, rejected_index=j, **about)
        for i, a in enumerate(chosen)
        for j, b in enumerate(rejected)
    ]


def _answered(identity: str, subset: str, prompt: list[Message], chosen: str, rejected: str) -> Comparison:
    chats = _answer(prompt, chosen), _answer(prompt, rejected)
    return Comparison(identity, str(subset), prompt_id(prompt), *chats, item=identity)


def _answer(prompt: list[Message], text: str) -> list[Message]:
    return _chat(conversation(prompt, text))


def _prompt(value: Any, row: dict) -> list[Message]:
    """A prompt with the system message and the history of its row. The benchmarks' texts are one turn, whatever they
    contain; `core.data.layouts` takes dialogues and templates apart in other pairs."""
    refuse_unusable(row)
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else as_messages(value, [])
    return with_context(turns, row, (), [])


def _chat(messages: object) -> list[Message]:
    """The messages of a conversation; DataError for anything else. Responses may be empty, as in some benchmarks."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError("a conversation must be a list of messages")
    if not all(isinstance(m.get("content"), str) for m in messages):
        raise DataError("a message needs a text")
    roles = [m.get("role") for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError("roles must alternate user, assistant, ... and end with assistant")
    if any(m["role"] == "user" and not m["content"].strip() for m in messages):
        raise DataError("a user turn is empty")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _id(row: dict, stem: str, number: int) -> str:
    given = next((row[key] for key in ("id", "question_id", "uid") if row.get(key) is not None), None)
    return f"{stem}:{number}" if given is None else str(given)


def _tables(path: Path, malformed: Malformed) -> Iterator[Table]:
    if not path.exists():
        raise DataError(
            f"--set: {path} is neither a file nor a folder of files ({', '.join(SUFFIXES)}); fetch a set with "
            "`hf download NAME --repo-type dataset --local-dir FOLDER`"
        )
    return local_tables(path, malformed)


def _parse(table: Table, reader: Callable, malformed: Malformed) -> list[list[Comparison]]:
    """Comparisons of each row that can be used."""
    items = []
    for number, row in table.rows:
        try:
            items.append(reader(row, table.name, number))
            malformed.read += 1
        except KeyError as error:
            malformed.add(f"no column {error.args[0]!r}", f"{table.file} row {number}")
        except (DataError, TypeError, AttributeError) as error:
            malformed.add(str(error), f"{table.file} row {number}")
    return items


def _pairs(table: Table, malformed: Malformed) -> list[list[Comparison]]:
    """Comparisons of a table that `core.data.sources` reads."""
    items = []
    for row in table_pairs(table, malformed):
        identity = f"{table.name}:{row['row']}"
        comparison = _answered(identity, row["source"], row["prompt"], row["chosen"], row["rejected"])
        items.append([replace(comparison, label_tie=row["tie"])])
    return items


def _unique(items: list[tuple[Path, list[Comparison]]]) -> list[Comparison]:
    """All comparisons. Items with one id are numbered; one and the same item in two files is refused."""
    seen: dict[str, list[tuple[Path, str]]] = {}
    comparisons = []
    for file, item in items:
        others = seen.setdefault(item[0].item, [])
        text = digest([[c.chosen, c.rejected] for c in item])
        if twin := next((other for other, same in others if same == text and other != file), None):
            raise DataError(f"item {item[0].item!r} is in {twin} and in {file}: give --set one of the files")
        suffix = f"#{len(others) + 1}" if others else ""
        others.append((file, text))
        comparisons += [replace(c, id=c.id + suffix, item=c.item + suffix) for c in item]
    return comparisons
