"""Stage `prompts`: read, check, deduplicate and split the prompts by hash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from core.config import Config, Splits
from core.data.chat import ChatTokenizer, Message, check_prompt
from core.data.splits import normalised, prompt_id, split_of
from core.data.streams import unit_interval
from core.errors import ArtefactError, DataError
from core.files import numbered_rows, write_jsonl, write_table


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    tokenizer = ChatTokenizer(cfg.policy)
    kept, rejected = {}, []
    for number, row in numbered_rows(cfg.data.prompts):
        try:
            messages = _messages(row, cfg.data.system)
            num_tokens = len(tokenizer.prompt_ids(messages))
            if num_tokens > cfg.data.max_prompt_tokens:
                raise DataError(f"longer than data.max_prompt_tokens ({num_tokens} > {cfg.data.max_prompt_tokens})")
            identity = prompt_id(messages)
            if identity in kept:
                raise DataError("stands twice")
        except DataError as error:
            rejected.append({"line": number, "reason": str(error), "row": row})
            continue
        kept[identity] = {
            "prompt_id": identity,
            "prompt": messages,
            "num_tokens": num_tokens,
            "split": split_of(normalised(messages), cfg.data.splits),
            "order": unit_interval(identity, salt=f"order/{cfg.run.seed}"),
        }
    if not kept:
        fault = rejected[0] if rejected else "the file holds no rows"
        raise ArtefactError(f"{cfg.data.prompts}: no usable prompt; first fault: {fault}")
    write_jsonl(out / "rejected.jsonl", rejected)
    write_table(out / "prompts.parquet", sorted(kept.values(), key=lambda row: row["order"]))
    counts = Counter(row["split"] for row in kept.values())
    sizes = ", ".join(f"{name} {counts[name]}" for name in Splits.model_fields)
    return {
        "headline": f"{len(kept)} prompts ({sizes}), {len(rejected)} rejected",
        "prompts": dict(counts),
        "rejected": dict(Counter(r["reason"].split(" (")[0] for r in rejected)),
    }


def _messages(row: dict, system: str | None) -> list[Message]:
    if isinstance(row.get("prompt"), str):
        messages = check_prompt([{"role": "user", "content": row["prompt"]}])
    elif "messages" in row:
        messages = check_prompt(row["messages"])
    else:
        raise DataError("no `prompt` (a string) and no `messages`")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages
