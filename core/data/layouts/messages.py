"""Lists of messages in the forms that published sets write them in -> messages with a role and a text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from core.data.chat import Message
from core.data.layouts.text import ROLES
from core.errors import DataError

UNUSABLE = (
    "tools", "functions", "tool_calls", "function_call", "images", "image", "videos", "video", "audios", "audio",
    "reasoning_content", "thinking",
)  # fmt: skip
"""Columns of a row, or keys of a message, that a text alone cannot stand for. With content, they refuse the row."""


NO_PROMPT = "no prompt (none in prompt, instruction, question or conversations, nor before the answers)"


def refuse_unusable(columns: Mapping[str, Any], own: Collection[str] = ()) -> None:
    """DataError, which is the name of the column, for a row or a message that has one of UNUSABLE but not of `own`."""
    if columns.keys().isdisjoint(UNUSABLE):  # nearly always, and this is done for each message
        return
    for name in UNUSABLE:
        if name not in own and is_filled(columns.get(name)):
            raise DataError(name)


def is_filled(value: object) -> bool:
    """Whether a column holds anything: an empty list is also written as text, and Parquet has nulls."""
    return value not in (None, "", [], {}, "[]", "{}", "null")


def as_messages(value: Any, notes: list[str]) -> list[Message]:
    """The messages of a list, or of a single message.

    `from`/`value`, lists of text parts, and other names of the roles are taken; a developer's turn becomes a system
    turn; an empty system turn is left out. What was done is added to `notes`.

    Raises:
        DataError: no messages, a role that is not known, a turn without text, a part that is not text, or one of
            UNUSABLE.
    """
    if isinstance(value, str):
        value = _written_as_text(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        raise DataError("a conversation must be a list of messages")
    messages = []
    for message in value:
        turn = _message(message, notes)
        if turn == {"role": "system", "content": ""}:
            notes.append("empty system turn left out")
        else:
            messages.append(turn)
    if not messages:
        raise DataError(NO_PROMPT)
    return messages


def is_messages(value: object) -> bool:
    """Whether a value is messages, or text that is a JSON list of them, as CSV files hold it."""
    if isinstance(value, str):
        return value.lstrip().startswith("[{") and _written_as_text(value) is not value
    return isinstance(value, list | Mapping)


def _written_as_text(value: str) -> Any:
    """The list of messages that a text holds as JSON, else the text."""
    try:
        read = json.loads(value)
    except ValueError:
        if re.match(r"\s*\[\{'(role|content|from|value)':", value):  # as `pandas` writes lists into CSV
            raise DataError("messages written as text, but not as JSON") from None
        return value
    keys = [set(m) for m in read if isinstance(m, dict)] if isinstance(read, list) else []
    return read if keys and all({"role", "content"} <= k or {"from", "value"} <= k for k in keys) else value


def _message(message: Mapping[str, Any], notes: list[str]) -> Message:
    name = message.get("role") or message.get("from")
    refuse_unusable(message)  # first, since these also stand where the text is missing
    text = _text(message["content"] if message.get("content") is not None else message.get("value"))
    if text is None:
        raise DataError("a turn without text")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"a turn of role {name!r}")
    if name == "developer":
        notes.append("developer turn read as system turn")
    if role == "system" and not text.strip():
        text = ""
    return {"role": role, "content": text}


def _text(content: Any) -> str | None:
    """The text of a turn, whose parts are put together; None where there is none."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    parts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        said = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(said, str):
            raise DataError(f"a part of type {kind!r}")
        parts.append(said)
    return "".join(parts)
