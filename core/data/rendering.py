"""Conversations as text: the chat template of a tokenizer with the options of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix
from typing import Any, TypeVar

from core.config import Model
from core.data import templates
from core.errors import DataError

T = TypeVar("T")
Message = dict[str, str]
"""`{"role": ..., "content": ...}`"""
SETTINGS = "chat_settings"
"""Entry of tokenizer_config.json for the options of `Model` that a chat template cannot hold."""
QUESTION: list[Message] = [{"role": "user", "content": "Question"}]
ANSWER, SYSTEM = "A probe response", "A probe system text"


@dataclass(frozen=True, slots=True)
class AnswerLayout:
    """Where a template puts an answer, seen in one conversation of a question and an answer."""

    bare: str
    """The question alone."""
    generation_prompt: str
    """The question and the generation prompt."""
    answer_prompt: str
    """What stands before the answer."""
    end: str | None
    """What stands after it, without white space around it; EOS where that is nothing."""
    kept: bool
    """Answers begin after the generation prompt, whatever the template writes before an answer."""

    @property
    def lead(self) -> str:
        """White space that the template writes between its generation prompt and an answer."""
        more = self.answer_prompt.removeprefix(self.generation_prompt)
        return "" if self.kept or more == self.answer_prompt or more.strip() else more

    @property
    def lacks_header(self) -> bool:
        """Whether the template has no generation prompt, though it writes a header before an answer."""
        header = self.answer_prompt.removeprefix(self.bare)
        return (
            self.generation_prompt == self.bare != self.answer_prompt
            and header != self.answer_prompt
            and bool(header.strip())
        )

    def check(self, name: str) -> None:
        """DataError, with what can be done, where an answer does not come right after the generation prompt."""
        if self.kept or self.answer_prompt == self.generation_prompt + self.lead:
            return
        common = len(commonprefix([self.generation_prompt, self.answer_prompt]))
        raise DataError(
            f"{name}: its chat template ends a prompt with {self.generation_prompt[common:]!r} when an answer is to be "
            f"generated, but writes {self.answer_prompt[common:]!r} before an answer that is there (such as an empty "
            "thought). Set generation_prompt of policy and rm.base to answer (answers come after what the template "
            "writes before them) or to template (they come after its generation prompt, the model may think first), "
            "or set template_kwargs (such as enable_thinking: false) or chat_template so that both agree"
        )


class ChatTemplate:
    """The chat template of a tokenizer, with everything in it that the configuration fixes.

    Attributes:
        settings: options other than `auto` that the template cannot hold; saved with the tokenizer.

    Raises:
        DataError: no template; options that do not fit it. Of the methods: conversations that the template refuses.
    """

    def __init__(self, hf: Any, model: Model):
        self.name, self._hf = model.path, hf
        options = {"generation_prompt": model.generation_prompt, "system_turn": model.system_turn}
        self.settings = dict(hf.init_kwargs.get(SETTINGS) or {}) | {
            key: value for key, value in options.items() if value != "auto"
        }
        if self.settings:
            hf.init_kwargs[SETTINGS] = self.settings
        if model.chat_template is not None:
            hf.chat_template = templates.named_template(model.chat_template)
        given = hf.chat_template.get("default") if isinstance(hf.chat_template, dict) else hf.chat_template
        if not given:
            raise DataError(
                f"{self.name} has no chat template: name one in policy.chat_template (or rm.base.chat_template), or "
                "use a chat model"
            )
        day = model.chat_date.isoformat() if model.chat_date else None
        self._text = templates.with_date(templates.with_variables(given, model.template_kwargs), day)
        if self._text != given:
            hf.chat_template = self._text
        layout, mode = value_or_none(lambda: self.layout), self.settings.get("generation_prompt", "auto")
        if layout and (mode == "answer" or (mode == "auto" and layout.lacks_header)):
            self._use_answer_header(layout)
            if mode == "answer" and self.layout.generation_prompt != layout.answer_prompt:
                raise DataError(
                    f"{self.name}: its chat template ends a conversation differently where no answer follows, so "
                    "generation_prompt: answer is not possible: set it to template, or give another chat_template"
                )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self._hf.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may call anything of Python's on anything
            raise DataError(f"the chat template of {self.name} refuses the conversation: {error}") from None

    @cached_property
    def layout(self) -> AnswerLayout:
        """Where the template puts an answer, from a probe conversation."""
        answered = [*QUESTION, {"role": "assistant", "content": ANSWER}]
        prompt, found, rest = self.render(answered, add_generation_prompt=False).rpartition(ANSWER)
        if not found:
            raise DataError(f"{self.name}: its chat template renders a response differently from its text")
        return AnswerLayout(
            bare=self.render(QUESTION, add_generation_prompt=False),
            generation_prompt=self.render(QUESTION, add_generation_prompt=True),
            answer_prompt=prompt,
            end=rest.strip() or self._hf.eos_token,
            kept=self.settings.get("generation_prompt") == "template",
        )

    def moves_system(self, messages: Sequence[Message]) -> bool:
        """Whether the text of the system turn is put before the first user turn of these messages."""
        mode = self.settings.get("system_turn", "auto")
        return messages[0]["role"] == "system" and (mode == "first_user" or not self._renders_system)

    def system_in_place(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their system turn where the template can render it; DataError where that is refused."""
        if not messages or not self.moves_system(messages):
            return list(messages)
        if self.settings.get("system_turn") == "refuse":
            raise DataError(
                f"the chat template of {self.name} has no system turn, and system_turn is refuse (auto puts its text "
                "before the first user turn)"
            )
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise DataError("there is no user turn that the text of the system turn could be put before")
        system, user, *rest = messages
        return [{**user, "content": system["content"] + "\n\n" + user["content"]}, *rest]

    @cached_property
    def _renders_system(self) -> bool:
        """Whether the template writes system turns; some refuse them, and some leave them out without a word."""
        prompt = [{"role": "system", "content": SYSTEM}, *QUESTION]
        return SYSTEM in (value_or_none(lambda: self.render(prompt, add_generation_prompt=False)) or "")

    def _use_answer_header(self, layout: AnswerLayout) -> None:
        """Make the generation prompt what the template writes before an answer, where that leaves all else as it is."""
        header = layout.answer_prompt.removeprefix(layout.bare)
        if layout.answer_prompt == layout.generation_prompt or header == layout.answer_prompt:
            return
        before = self._hf.chat_template
        self._hf.chat_template = templates.with_answer_header(self._text, header)
        wanted = replace(layout, generation_prompt=layout.answer_prompt)
        del self.layout
        if value_or_none(lambda: self.layout) != wanted:
            self._hf.chat_template = before
            self.__dict__["layout"] = layout


def value_or_none(get: Callable[[], T]) -> T | None:
    """What `get` returns; None where it is a DataError, because the template or the tokenizer has no such thing."""
    try:
        return get()
    except DataError:
        return None
