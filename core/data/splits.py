"""Ids of prompts and pairs, and the split that a prompt belongs to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from core.config import Splits
from core.data.chat import Message
from core.data.rows import PromptRow
from core.data.streams import unit_interval
from core.errors import ArtefactError
from core.files import digest, read_table


def prompt_id(messages: Sequence[Message]) -> str:
    """Stable id of a prompt: 16 hex digits over roles and contents."""
    return digest([[m["role"], m["content"]] for m in messages])


def pair_id(prompt: str, responses: Sequence[str]) -> str:
    """Stable id of a pair, whichever response is chosen: 16 hex digits over the id of its prompt and both responses."""
    return digest([prompt, sorted(responses)])


def normalised(messages: Sequence[Message]) -> str:
    """The turns of a prompt without case, space, punctuation and system message, to compare prompts by."""
    turns = [m["content"] for m in messages if m["role"] != "system"]
    return "\n".join("".join(c for c in turn.lower() if c.isalnum()) for turn in turns)


def opening(messages: Sequence[Message]) -> str:
    """The normalised prompt up to its first user turn; conversations that share it are not independent."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    return normalised(messages[: first + 1])


def split_of(key: str, splits: Splits) -> str:
    """The split of the prompt whose normalised text is `key`: the part of [0, 1) that its hash falls into."""
    u, edge = unit_interval(key, salt="split"), 0.0
    names = list(Splits.model_fields)
    for name in names:
        edge += getattr(splits, name)
        if u < edge:
            return name
    return names[-1]


def read_split(folder: Path, split: str, limit: int | None = None) -> list[PromptRow]:
    """Rows of one split in the order of the run, at most `limit`; ArtefactError when the split has fewer than two."""
    rows = [row for row in read_table(folder / "prompts.parquet", PromptRow) if row["split"] == split]
    if len(rows) < 2:
        raise ArtefactError(
            f"split {split!r} has {len(rows)} prompts: give data.prompts (for eval, data.eval_prompts, if that is set) "
            f"more rows or raise data.splits.{split}"
        )
    return rows[:limit]


def held_out_prompts(folder: Path) -> set[str]:
    """Normalised prompts of the splits that nothing is trained on; `folder` is that of stage `prompts`."""
    rows = read_table(folder / "prompts.parquet", PromptRow)
    return {normalised(row["prompt"]) for row in rows if row["split"] in ("eval", "calibration")}


def begins_with(prompt: Sequence[Message], banned: Collection[str]) -> bool:
    """Whether a prompt, or its beginning up to any user turn, is one of these normalised prompts."""
    parts = (prompt[: i + 1] for i, m in enumerate(prompt) if m["role"] == "user")
    return any(normalised(part) in banned for part in parts)
