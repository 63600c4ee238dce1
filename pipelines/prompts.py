"""Stage `prompts`: read, check, deduplicate and split the prompts by hash."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from core import starting
from core.config import Config, Data, Splits
from core.data.chat import ChatTokenizer, Message, with_system
from core.data.layouts.pairing import prompt_of
from core.data.layouts.readers import PROMPTS, asked
from core.data.near import Known
from core.data.rows import PromptRow
from core.data.splits import normalised, prompt_id, split_of
from core.data.streams import unit_interval
from core.errors import ArtefactError, DataError
from core.files import storable, write_jsonl, write_table
from core.row_files import numbered_rows

DUPLICATE = "duplicate"
TOO_LONG = "longer than data.max_prompt_tokens"
REPEATS = {"exactly": "repeats a prompt of another split", "nearly": "nearly repeats a prompt of another split"}
NOT_MALFORMED = (DUPLICATE, TOO_LONG, *REPEATS.values())


class PromptsMetrics(TypedDict):
    headline: str
    prompts: dict[str, int]
    """Prompts of each split."""
    rejected: dict[str, int]
    """Rows of `data.prompts` that are not used, by reason."""
    eval_rejected: dict[str, int]
    """The same of `data.eval_prompts`; empty without it."""
    changed: dict[str, int]
    """Rows that were used after a change, by what was done."""
    system_moved: int
    """Prompts whose system turn is put before the first user turn, because the chat template has none."""


class Rejected(TypedDict):
    """A line of `rejected.jsonl`, or of `eval_rejected.jsonl`."""

    line: int
    """Line or row of the file, from 1."""
    reason: str
    row: dict[str, Any] | None
    """None for a line that cannot be read."""


class Prompts(NamedTuple):
    """What one file holds."""

    usable: list[PromptRow]
    """In the order of the run."""
    rejected: list[Rejected]
    malformed: int
    """Rejected rows that are neither repeated nor too long."""
    changed: Counter[str]
    """What was done to usable rows."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> PromptsMetrics:
    """Writes `prompts.parquet`, `rejected.jsonl`, and with `data.eval_prompts` `eval_rejected.jsonl`."""
    tokenizer = ChatTokenizer(cfg.policy)
    tokenizer.check()
    starting.working()
    own, other = read_prompts(cfg.data, tokenizer, seed=cfg.run.seed)
    reasons = _checked(cfg.data, cfg.data.prompts, own, out / "rejected.jsonl")
    of_other: dict[str, int] = {}
    if other and cfg.data.eval_prompts:
        of_other = _checked(cfg.data, cfg.data.eval_prompts, other, out / "eval_rejected.jsonl")
    prompts = in_order(own, other)
    write_table(out / "prompts.parquet", prompts, PromptRow)
    counts = Counter(row["split"] for row in prompts)
    sizes = ", ".join(f"{name} {counts[name]}" for name in Splits.model_fields)
    left_out = f"{len(own.rejected)} rejected"
    if other:
        left_out += f", and {len(other.rejected)} of {cfg.data.eval_prompts}"
    return {
        "headline": f"{len(prompts)} prompts ({sizes}), {left_out}",
        "prompts": dict(counts),
        "rejected": reasons,
        "eval_rejected": of_other,
        "changed": dict(own.changed + (other.changed if other else Counter())),
        "system_moved": sum(tokenizer.moves_system(row["prompt"]) for row in prompts),
    }


def _checked(data: Data, file: Path, found: Prompts, rejected: Path) -> dict[str, int]:
    """The rejected rows by reason, which are written to a file.

    Raises:
        ArtefactError: no usable prompt, or too many malformed rows.
    """
    write_jsonl(rejected, found.rejected)  # before the share is checked: whoever reads of it wants to see them
    reasons = Counter(_kind(r) for r in found.rejected)
    if not found.usable:
        why = "; ".join(_lines(reasons, found.rejected)) or "the file holds no rows"
        raise ArtefactError(f"{file}: no usable prompt: {why}")
    if found.malformed > data.max_rejected_share * (rows := len(found.usable) + len(found.rejected)):
        raise ArtefactError(
            f"{file}: {found.malformed} of {rows} rows are malformed, more than data.max_rejected_share "
            f"{data.max_rejected_share:g}: " + "; ".join(_lines(reasons, found.rejected, without=NOT_MALFORMED))
        )
    return dict(reasons)


def read_prompts(data: Data, tokenizer: ChatTokenizer, *, seed: int) -> tuple[Prompts, Prompts | None]:
    """The rows of `data.prompts`, and those of `data.eval_prompts`, which are then the split eval.

    Raises:
        ArtefactError: a file that cannot be read.
    """
    own = _read(data.prompts, data, tokenizer, seed)
    if data.eval_prompts is None:
        return own, None
    own = own._replace(usable=[row for row in own.usable if row["split"] != "eval"])
    known = Known(row["prompt"] for row in own.usable)
    return own, _read(data.eval_prompts, data, tokenizer, seed, known)


def _read(file: Path, data: Data, tokenizer: ChatTokenizer, seed: int, known: Known | None = None) -> Prompts:
    """The rows of a file; with `known`, all are for the split eval, and those that repeat one of these are left out."""
    prompts: dict[str, PromptRow] = {}
    rejected: list[Rejected] = []
    changed: Counter[str] = Counter()
    unread = lambda number, fault: rejected.append({"line": number, "reason": fault, "row": None})  # noqa: E731
    for number, row in numbered_rows(file, unread):
        notes: list[str] = []
        try:
            prompt = _prompt(row, data, tokenizer, seed, notes)
            if prompt["prompt_id"] in prompts:
                raise DataError(DUPLICATE)
            if known is not None:
                prompt["split"] = "eval"
                if how := known.repeated_by(prompt["prompt"]):
                    raise DataError(REPEATS[how])
        except DataError as error:
            rejected.append({"line": number, "reason": str(error), "row": storable(row)})
            continue
        prompts[prompt["prompt_id"]] = prompt
        changed.update(set(notes))
    malformed = sum(_kind(r) not in NOT_MALFORMED for r in rejected)
    return Prompts(sorted(prompts.values(), key=lambda row: row["order"]), rejected, malformed, changed)


def in_order(own: Prompts, other: Prompts | None) -> list[PromptRow]:
    """The usable prompts of both files, in the order of the run."""
    return sorted([*own.usable, *(other.usable if other else [])], key=lambda row: row["order"])


def _kind(rejected: Rejected) -> str:
    """The reason without its details."""
    return rejected["reason"].split(" (")[0]


def _lines(reasons: Counter[str], rejected: list[Rejected], without: Collection[str] = ()) -> list[str]:
    """Each reason why a row is rejected, with the number of rows and the first of them."""
    first = {_kind(r): r["line"] for r in reversed(rejected)}
    return [f"{n} x {why} (first in row {first[why]})" for why, n in reasons.most_common() if why not in without]


def _prompt(row: dict[str, Any], data: Data, tokenizer: ChatTokenizer, seed: int, notes: list[str]) -> PromptRow:
    messages = with_system(_messages(row, notes), data.system)
    num_tokens = len(tokenizer.prompt_ids(messages))
    if num_tokens > data.max_prompt_tokens:
        raise DataError(f"{TOO_LONG} ({num_tokens} > {data.max_prompt_tokens})")
    identity = prompt_id(messages)
    prompt: PromptRow = {
        "prompt_id": identity,
        "prompt": messages,
        "num_tokens": num_tokens,
        "split": split_of(normalised(messages), data.splits),
        "order": unit_interval(identity, salt=f"order/{seed}"),
    }
    if data.metadata:
        prompt["metadata"] = _metadata(row, data)
    return prompt


def _metadata(row: dict[str, Any], data: Data) -> str:
    if missing := [name for name in data.metadata if row.get(name) is None]:
        raise DataError(f"no {missing[0]} (data.metadata)")
    return json.dumps({name: storable(row[name]) for name in data.metadata}, ensure_ascii=False, default=str)


def _messages(row: dict[str, Any], notes: list[str]) -> list[Message]:
    """The prompt of a row, in the columns of `core.data.layouts` or in `messages`."""
    given = asked(row)
    given = row.get("messages") if given is None else given
    if given is None and not {*PROMPTS, "messages"} & row.keys():
        raise DataError("neither `prompt` nor `messages`")
    return prompt_of(given, row, PROMPTS, notes)
