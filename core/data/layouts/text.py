"""Conversations that are written as one text: dialogues, and renderings of chat templates."""

from __future__ import annotations

import re
from typing import NamedTuple

from core.data.chat import Message
from core.errors import DataError

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "developer": "system",
}  # fmt: skip
"""What published sets call a speaker -> our role. A developer's turn is a system turn, as most templates have none."""


class Template(NamedTuple):
    header: str
    """Regular expression of what begins a turn; its group is the role."""
    end: str
    """What ends a turn."""


TEMPLATES = (
    Template(r"<\|im_start\|>(\w+)\n", "<|im_end|>"),  # ChatML: Qwen, SmolLM2, Zephyr's successors
    Template(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n", "<|eot_id|>"),  # Llama 3
    Template(r"<start_of_turn>(\w+)\n", "<end_of_turn>"),  # Gemma
)
"""Templates whose renderings are taken apart again."""
BOS = r"(?:<s>|<bos>|<\|begin_of_text\|>)?\s*"


def parse_dialogue(text: str) -> list[Message]:
    r"""Messages of `...\n\nAssistant: ...\n\nHuman: ...`; the first turn is the user's, with or without `Human:`."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    parts = ["Human", *parts] if parts[0].strip() else parts[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]  # fmt: skip


def begins_dialogue(text: str) -> bool:
    """Whether a text begins with a turn of Human."""
    return re.match(r"\s*Human:", text) is not None


def is_dialogue(text: object) -> bool:
    """Whether a text is a whole dialogue: a turn of Human, and one of Assistant."""
    return isinstance(text, str) and bool(re.match(r"\s*Human:.*\n\nAssistant:", text, re.DOTALL))


def is_conversation(text: object) -> bool:
    """Whether a text holds a conversation of both sides, as a dialogue or as a template renders it."""
    if not isinstance(text, str):
        return False
    rendered = parse_rendering(text)
    return is_dialogue(text) or (rendered is not None and len(rendered) > 1)


def parse_conversation(text: str) -> list[Message]:
    """The messages of a text for which `is_conversation` holds."""
    return parse_rendering(text) or parse_dialogue(text)


def parse_prompt(text: str) -> list[Message]:
    """A prompt that is given as one text.

    It has several turns if it is written as in HH-RLHF, as in HelpSteer2, or as a chat template renders it. A header of
    the assistant at its end is left out. Any other text is one turn of the user, whatever it contains.
    """
    if begins_dialogue(text):
        turns = parse_dialogue("\n\n" + text.strip())
    elif rendered := parse_rendering(text):
        return rendered
    else:
        parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", text)
        turns = [{"role": "user", "content": parts[0]}]
        turns += [{"role": who.lower(), "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def parse_rendering(text: str) -> list[Message] | None:
    """The messages of a rendering by one of TEMPLATES; None for any other text.

    The whole text has to be such turns, and all of them but the last have to end as the template says: a marker within
    a text makes no rendering of it.
    """
    for template in TEMPLATES:
        if not re.match(BOS + template.header, text):
            continue
        before, *parts = re.split(template.header, text)
        turns = [(ROLES.get(who), said) for who, said in zip(parts[::2], parts[1::2], strict=True)]
        closed = all(said.rstrip().endswith(template.end) for _, said in turns[:-1])
        if re.fullmatch(BOS, before) and closed and all(role for role, _ in turns):
            messages = [{"role": str(role), "content": without_end(said)} for role, said in turns]
            opened = messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip()
            return messages[:-1] if opened else messages
    return None


def without_end(text: str) -> str:
    """A text without the end of turn of one of TEMPLATES."""
    for template in TEMPLATES:
        if text.rstrip().endswith(template.end):
            return text.rstrip().removesuffix(template.end)
    return text


def answer_of_dialogue(text: str) -> str:
    """An answer to a prompt that is a dialogue, as it would stand at the end of the whole dialogue."""
    return re.sub(r"\A\s*Assistant:", "", text).strip()


def is_rendered_answer(text: str) -> bool:
    """Whether a text is one turn of the assistant as a template renders it, with its header."""
    turns = parse_rendering(text)
    return turns is not None and [m["role"] for m in turns] in ([], ["assistant"])  # an empty turn is left out


def answer_of_rendering(text: str) -> str:
    """An answer to a rendered prompt, without the end of its turn, and without a header of the assistant.

    Raises:
        DataError: other turns than one of the assistant.
    """
    if is_rendered_answer(text):
        turns = parse_rendering(text)
        return turns[0]["content"] if turns else ""
    if any(re.match(BOS + template.header, text) for template in TEMPLATES):
        raise DataError("an answer is rendered as other turns than one of the assistant")
    return without_end(text)
