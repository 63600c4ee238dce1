"""Stage `prompts`: read, check, deduplicate and split the prompts by hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from core import starting
from core.config import Config, Data, Splits
from core.data.chat import ChatTokenizer, Message, with_system
from core.data.layouts.pairing import prompt_of
from core.data.layouts.readers import PROMPTS, asked
from core.data.rows import PromptRow
from core.data.splits import normalised, prompt_id, split_of
from core.data.streams import unit_interval
from core.errors import ArtefactError, DataError
from core.files import storable, write_jsonl, write_table
from core.row_files import numbered_rows

DUPLICATE = "duplicate"
TOO_LONG = "longer than data.max_prompt_tokens"
NOT_MALFORMED = (DUPLICATE, TOO_LONG)


class PromptsMetrics(TypedDict):
    headline: str
    prompts: dict[str, int]
    """Prompts of each split."""
    rejected: dict[str, int]
    """Rows of the file that are not used, by reason."""
    changed: dict[str, int]
    """Rows that were used after a change, by what was done."""
    system_moved: int
    """Prompts whose system turn is put before the first user turn, because the chat template has none."""


class Rejected(TypedDict):
    """A line of `rejected.jsonl`."""

    line: int
    """Line or row of `data.prompts`, from 1."""
    reason: str
    row: dict[str, Any] | None
    """None for a line that cannot be read."""


class Prompts(NamedTuple):
    usable: list[PromptRow]
    """In the order of the run."""
    rejected: list[Rejected]
    malformed: int
    """Rejected rows that are neither repeated nor too long."""
    changed: Counter[str]
    """What was done to usable rows."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> PromptsMetrics:
    """Writes `prompts.parquet` and `rejected.jsonl`."""
    tokenizer = ChatTokenizer(cfg.policy)
    tokenizer.check()
    starting.working()
    prompts, rejected, malformed, changed = read_prompts(cfg.data, tokenizer, seed=cfg.run.seed)
    write_jsonl(out / "rejected.jsonl", rejected)  # before the share is checked: whoever reads of it wants to see them
    reasons = Counter(_kind(r) for r in rejected)
    if not prompts:
        why = "; ".join(_lines(reasons, rejected)) or "the file holds no rows"
        raise ArtefactError(f"{cfg.data.prompts}: no usable prompt: {why}")
    if malformed > cfg.data.max_rejected_share * (rows := len(prompts) + len(rejected)):
        raise ArtefactError(
            f"{cfg.data.prompts}: {malformed} of {rows} rows are malformed, more than data.max_rejected_share "
            f"{cfg.data.max_rejected_share:g}: " + "; ".join(_lines(reasons, rejected, without=NOT_MALFORMED))
        )
    write_table(out / "prompts.parquet", prompts, PromptRow)
    counts = Counter(row["split"] for row in prompts)
    sizes = ", ".join(f"{name} {counts[name]}" for name in Splits.model_fields)
    return {
        "headline": f"{len(prompts)} prompts ({sizes}), {len(rejected)} rejected",
        "prompts": dict(counts),
        "rejected": dict(reasons),
        "changed": dict(changed),
        "system_moved": sum(tokenizer.moves_system(row["prompt"]) for row in prompts),
    }


def read_prompts(data: Data, tokenizer: ChatTokenizer, *, seed: int) -> Prompts:
    """The rows of `data.prompts`.

    Raises:
        ArtefactError: a file that cannot be read.
    """
    prompts: dict[str, PromptRow] = {}
    rejected: list[Rejected] = []
    changed: Counter[str] = Counter()
    unread = lambda number, fault: rejected.append({"line": number, "reason": fault, "row": None})  # noqa: E731
    for number, row in numbered_rows(data.prompts, unread):
        notes: list[str] = []
        try:
            prompt = _prompt(row, data, tokenizer, seed, notes)
            if prompt["prompt_id"] in prompts:
                raise DataError(DUPLICATE)
        except DataError as error:
            rejected.append({"line": number, "reason": str(error), "row": storable(row)})
            continue
        prompts[prompt["prompt_id"]] = prompt
        changed.update(set(notes))
    malformed = sum(_kind(r) not in NOT_MALFORMED for r in rejected)
    return Prompts(sorted(prompts.values(), key=lambda row: row["order"]), rejected, malformed, changed)


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
    return {
        "prompt_id": identity,
        "prompt": messages,
        "num_tokens": num_tokens,
        "split": split_of(normalised(messages), data.splits),
        "order": unit_interval(identity, salt=f"order/{seed}"),
    }


def _messages(row: dict[str, Any], notes: list[str]) -> list[Message]:
    """The prompt of a row, in the columns of `core.data.layouts` or in `messages`."""
    given = asked(row)
    given = row.get("messages") if given is None else given
    if given is None and not {*PROMPTS, "messages"} & row.keys():
        raise DataError("neither `prompt` nor `messages`")
    return prompt_of(given, row, PROMPTS, notes)
