"""Stage `prompts`: read, check, deduplicate and split the prompts by hash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

from core.config import Config, Data, Splits
from core.data.chat import ChatTokenizer, Message, check_prompt, with_system
from core.data.rows import PromptRow
from core.data.splits import normalised, prompt_id, split_of
from core.data.streams import unit_interval
from core.errors import ArtefactError, DataError
from core.files import write_jsonl, write_table
from core.row_files import numbered_rows


class PromptsMetrics(TypedDict):
    headline: str
    prompts: dict[str, int]
    """Prompts of each split."""
    rejected: dict[str, int]
    """Rows of the file that are not used, by reason."""


class Rejected(TypedDict):
    """A line of `rejected.jsonl`."""

    line: int
    """Line or row of `data.prompts`, from 1."""
    reason: str
    row: dict[str, Any]


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> PromptsMetrics:
    """Writes `prompts.parquet` and `rejected.jsonl`."""
    prompts, rejected = read_prompts(cfg.data, ChatTokenizer(cfg.policy), seed=cfg.run.seed)
    if not prompts:
        fault = rejected[0] if rejected else "the file holds no rows"
        raise ArtefactError(f"{cfg.data.prompts}: no usable prompt; first fault: {fault}")
    write_jsonl(out / "rejected.jsonl", rejected)
    write_table(out / "prompts.parquet", prompts, PromptRow)
    counts = Counter(row["split"] for row in prompts)
    sizes = ", ".join(f"{name} {counts[name]}" for name in Splits.model_fields)
    return {
        "headline": f"{len(prompts)} prompts ({sizes}), {len(rejected)} rejected",
        "prompts": dict(counts),
        "rejected": dict(Counter(r["reason"].split(" (")[0] for r in rejected)),
    }


def read_prompts(data: Data, tokenizer: ChatTokenizer, *, seed: int) -> tuple[list[PromptRow], list[Rejected]]:
    """The prompts of `data.prompts` in the order of the run, and the rows that are not used.

    Raises:
        ArtefactError: a file, or a line of it, that cannot be read.
    """
    prompts: dict[str, PromptRow] = {}
    rejected: list[Rejected] = []
    for number, row in numbered_rows(data.prompts):
        try:
            prompt = _prompt(row, data, tokenizer, seed)
            if prompt["prompt_id"] in prompts:
                raise DataError("duplicate")
        except DataError as error:
            rejected.append({"line": number, "reason": str(error), "row": row})
            continue
        prompts[prompt["prompt_id"]] = prompt
    return sorted(prompts.values(), key=lambda row: row["order"]), rejected


def _prompt(row: dict[str, Any], data: Data, tokenizer: ChatTokenizer, seed: int) -> PromptRow:
    messages = _messages(row, data.system)
    num_tokens = len(tokenizer.prompt_ids(messages))
    if num_tokens > data.max_prompt_tokens:
        raise DataError(f"longer than data.max_prompt_tokens ({num_tokens} > {data.max_prompt_tokens})")
    identity = prompt_id(messages)
    return {
        "prompt_id": identity,
        "prompt": messages,
        "num_tokens": num_tokens,
        "split": split_of(normalised(messages), data.splits),
        "order": unit_interval(identity, salt=f"order/{seed}"),
    }


def _messages(row: dict[str, Any], system: str | None) -> list[Message]:
    if isinstance(row.get("prompt"), str):
        messages = check_prompt([{"role": "user", "content": row["prompt"]}])
    elif "messages" in row:
        messages = check_prompt(row["messages"])
    else:
        raise DataError("neither `prompt` (a string) nor `messages`")
    return with_system(messages, system)
