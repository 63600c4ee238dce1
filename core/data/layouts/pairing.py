"""What every layout has in common: the prompt and two answers of a row -> a checked pair."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.data.chat import Message, check_prompt, response_of
from core.data.layouts.messages import NO_PROMPT, as_messages, is_filled, is_messages, refuse_unusable
from core.data.layouts.text import (
    answer_of_dialogue,
    answer_of_rendering,
    begins_dialogue,
    is_conversation,
    is_rendered_answer,
    parse_conversation,
    parse_prompt,
    parse_rendering,
)
from core.data.literal import check_unicode
from core.errors import DataError

SYSTEM = ("system", "system_prompt")
"""Columns of a system message."""
CONTEXT = (*SYSTEM, "history")
"""Columns that belong to the prompt of any layout that does not use them for something else."""
REPEATED = "prompt repeated in both answers left out of them"
RENDERED = "rendering of a chat template taken apart"
FEW_WORDS = 3
"""Answers may begin with a prompt of fewer words by chance, as "Hello!" answers "Hello!"."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Two answers as the columns of a row hold them, before they are checked."""

    prompt: Any
    """Text or messages; None where both answers are conversations that begin with it."""
    chosen: Any
    """Text, message, messages, or a whole conversation."""
    rejected: Any
    margin: float | None = None
    """Rating of chosen minus that of rejected, 0 or more; None without ratings."""
    tie: bool = False


@dataclass(frozen=True, slots=True)
class Rated:
    """One answer with its rating, of a layout with one answer a row."""

    prompt: Any
    response: Any
    rating: float


@dataclass(frozen=True, slots=True)
class Answers:
    """A prompt that has been checked, and two answers to it."""

    prompt: list[Message]
    chosen: str
    rejected: str


def complete(
    draft: Draft, row: Mapping[str, Any], own: Collection[str], notes: list[str], *, repeats: bool = False
) -> Answers:
    """The checked prompt and answers of a draft, with the system message and the history that its row holds.

    Args:
        own: columns that the layout reads itself.
        notes: gets what was done to the texts.
        repeats: whether the rows of the file repeat their prompts in the answers, so that this also goes for prompts of
            fewer words than `FEW_WORDS`.

    Raises:
        DataError: why the row makes no pair.
    """
    refuse_unusable(row, own)
    prompt, chosen, rejected = _sides(draft, notes)
    texts = [draft.prompt] if isinstance(draft.prompt, str) else []
    chosen, rejected = without_prompt([*texts, prompt[-1]["content"]], chosen, rejected, notes, repeats=repeats)
    messages = check_prompt(with_context(prompt, row, own, notes))
    if not chosen.strip() or not rejected.strip():
        raise DataError("a response is empty")
    check_unicode(chosen, rejected)
    return Answers(messages, chosen, rejected)


def prompt_of(value: Any, row: Mapping[str, Any], own: Collection[str], notes: list[str]) -> list[Message]:
    """The checked prompt of a row without answers; as `complete` else."""
    refuse_unusable(row, own)
    if not is_filled(value):
        raise DataError("no prompt (none in prompt, instruction, question, conversations or messages)")
    return check_prompt(with_context(_prompt(value, notes), row, own, notes))


def with_context(
    prompt: list[Message], row: Mapping[str, Any], own: Collection[str], notes: list[str]
) -> list[Message]:
    """The prompt after the system message and the earlier turns of the row's columns `system` and `history`."""
    columns = {name: row[name] for name in CONTEXT if name not in own and is_filled(row.get(name))}
    if "history" in columns:
        head = prompt[:1] if prompt[:1] and prompt[0]["role"] == "system" else []
        prompt = [*head, *_history(columns.pop("history"), notes), *prompt[len(head) :]]
    if len(columns) == len(SYSTEM) and len(set(map(str, columns.values()))) > 1:
        raise DataError(f"the columns {' and '.join(columns)} hold different system messages")
    for name, text in columns.items():
        if not isinstance(text, str):
            raise DataError(f"{name} is no text")
        if not prompt or prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": text}, *prompt]
        elif prompt[0]["content"] != text:
            raise DataError(f"a system turn, and another one in the column {name}")
    return prompt


def _history(value: Any, notes: list[str]) -> list[Message]:
    if isinstance(value, list) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value):
        value = [
            {"role": role, "content": text}
            for turn in value
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    return as_messages(value, notes)


def _sides(draft: Draft, notes: list[str]) -> tuple[list[Message], str, str]:
    """The prompt and both answers as texts."""
    prompt = _prompt(draft.prompt, notes) if is_filled(draft.prompt) else []
    answers = (draft.chosen, draft.rejected)
    written = [isinstance(answer, str) and not is_messages(answer) for answer in answers]
    if not any(written):
        return _of_chats(prompt, [as_messages(answer, notes) for answer in answers], draft.prompt)
    if not all(written):
        raise DataError("the two answers are not written in the same way" if all(answers) else "a response is empty")
    if chats := _whole(prompt, *answers):
        notes += [REPEATED] if prompt else []
        return _of_chats([], chats, None)
    if not prompt:
        raise DataError(NO_PROMPT)
    given = draft.prompt if isinstance(draft.prompt, str) else ""
    if parse_rendering(given) or all(is_rendered_answer(answer) for answer in answers):
        notes.append(RENDERED)
        return prompt, answer_of_rendering(draft.chosen), answer_of_rendering(draft.rejected)
    if begins_dialogue(given):
        return prompt, answer_of_dialogue(draft.chosen), answer_of_dialogue(draft.rejected)
    return prompt, draft.chosen, draft.rejected


def _prompt(value: Any, notes: list[str]) -> list[Message]:
    if not is_filled(value):
        raise DataError(NO_PROMPT)
    return parse_prompt(value) if isinstance(value, str) and not is_messages(value) else as_messages(value, notes)


def _whole(prompt: list[Message], chosen: str, rejected: str) -> list[list[Message]] | None:
    """Both conversations of two texts that hold them, prompt included; None for two answers."""
    dialogues = all("\n\nAssistant:" in text for text in (chosen, rejected)) and not prompt
    if not dialogues and not (is_conversation(chosen) and is_conversation(rejected)):
        return None
    chats = [parse_conversation(text) for text in (chosen, rejected)]
    if prompt and any(len(chat) < 2 or chat[-2] != prompt[-1] for chat in chats):
        return None  # answers that quote a dialogue
    return chats


def _of_chats(prompt: list[Message], chats: list[list[Message]], given: Any) -> tuple[list[Message], str, str]:
    """The common prompt and the last turns of two lists of messages, with or without the prompt at their beginning."""
    bare = [chat[0]["role"] == "assistant" for chat in chats]
    if all(bare):
        chats = [[*prompt, *chat] for chat in chats]
    elif any(bare):
        raise DataError("the two answers are not written in the same way")
    elif isinstance(given, list):
        if any(_turns(chat)[: len(_turns(prompt))] != _turns(prompt) for chat in chats):
            raise DataError("the prompts differ")
        if prompt[0]["role"] == "system" != chats[0][0]["role"] == chats[1][0]["role"]:
            chats = [[prompt[0], *chat] for chat in chats]
    chosen, rejected = chats
    answers = response_of(chosen), response_of(rejected)
    if min(len(chosen), len(rejected)) < 2:
        raise DataError(NO_PROMPT)
    if chosen[:-1] != rejected[:-1]:
        asked = [[m for m in chat[:-1] if m["role"] != "assistant"] for chat in chats]
        raise DataError("the prompts differ" if asked[0] != asked[1] else "the dialogues differ before the last turn")
    return chosen[:-1], *answers


def _turns(messages: Sequence[Message]) -> list[Message]:
    return [m for m in messages if m["role"] != "system"]


def repeats_prompt(draft: Draft) -> bool | None:
    """Whether both answers of a draft of texts begin with its prompt; None for other drafts."""
    texts = (draft.prompt, draft.chosen, draft.rejected)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return all(_after(draft.prompt, answer) is not None for answer in texts[1:])


def without_prompt(
    prompts: Sequence[str], chosen: str, rejected: str, notes: list[str], *, repeats: bool
) -> tuple[str, str]:
    """Both answers without a prompt that both begin with; a prompt in one of them alone is part of the answer."""
    for text in prompts:
        if not repeats and len(text.split()) < FEW_WORDS:
            continue
        first, second = _after(text, chosen), _after(text, rejected)
        if first is not None and second is not None:
            notes.append(REPEATED)
            return first, second
    return chosen, rejected


def _after(prompt: str, answer: str) -> str | None:
    """What follows the prompt in an answer; None if it does not begin with it as whole words, or nothing follows."""
    prompt, answer = prompt.strip(), answer.lstrip()
    rest = answer[len(prompt) :]
    if not prompt or not answer.startswith(prompt) or not rest.strip():
        return None
    if rest[0].isalnum() and prompt[-1].isalnum():
        return None
    return re.sub(r"^\s*\n|^ (?! )", "", rest)  # the indentation of a line of code stays
