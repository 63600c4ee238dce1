"""Messages, conversations and the chat template: the only place where text becomes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from core.config import Model
from core.data.literal import TextEncoder, check_unicode
from core.data.rendering import QUESTION, ChatTemplate, Message, value_or_none
from core.data.special_tokens import added_tokens, control_tokens, end_ids, read_generation_settings, spare_token
from core.errors import DataError
from core.files import digest

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spiece*")
"""What the files of a tokenizer are called."""


def check_prompt(messages: object) -> list[Message]:
    """The messages of a prompt: roles alternate, the last one is the user's, and no turn is empty.

    Raises:
        DataError: anything else, or text that is not valid Unicode.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError("a prompt must be a non-empty list of messages")
    for m in messages:
        if not isinstance(m, dict) or not isinstance(m.get("content"), str) or not m["content"].strip():
            raise DataError("a message needs a role and a non-empty text")
    roles = [m.get("role") for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or not turns or turns[-1] != "user":
        raise DataError(f"roles must alternate user, assistant, ... and end with user, not {roles}")
    check_unicode(*(m["content"] for m in messages))
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def check_types(messages: object) -> None:
    """DataError for what is no list of messages with texts. It looks at types alone, since it is called for each
    conversation that is tokenised, and templates differ in which roles they take."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError("a conversation must be a non-empty list of messages")
    for m in messages:
        if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            raise DataError("a message needs a role and a text")


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages after the system message `system`, unless they have one of their own."""
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


def conversation(prompt: Sequence[Message], response: str) -> list[Message]:
    """A prompt and a response to it, as the messages that reward models score."""
    return [*prompt, {"role": "assistant", "content": response}]


def response_of(messages: Sequence[Message]) -> str:
    """The response that ends a conversation; DataError when the last message is not a text of the assistant."""
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    if last.get("role") != "assistant":
        raise DataError(f"a conversation must end with the assistant, not with {last.get('role')!r}")
    if not isinstance(last.get("content"), str):
        raise DataError("the assistant's message needs a text")
    return last["content"]


class ChatTokenizer:
    """A tokenizer with its chat template.

    A conversation is `prompt_ids(prompt) + response_ids(response)`. These are the tokens that the policy generates, and
    the policy, reward models and the critic all read them. BOS comes from the template only. Control tokens in
    contents and responses are encoded as ordinary text. What a template lacks is an error when it is asked for, so that
    `whole_ids` works with every template.

    Raises:
        DataError: no tokenizer there; no chat template; options that do not fit the tokenizer. Of the methods: no end
            of turn, no token for padding, answers that do not extend the generation prompt, what is no conversation, or
            one that the template refuses.
    """

    def __init__(self, model: Model):
        from transformers import AutoTokenizer

        self.name = model.path
        try:
            self.hf = AutoTokenizer.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
            self.hf("a")  # some values are read only when something is encoded
        except Exception as error:  # odd values in its files may raise anything
            # Of a folder without a tokenizer transformers says that a package is missing.
            empty = Path(model.path).is_dir() and not any(next(Path(model.path).glob(f), None) for f in TOKENIZER_FILES)
            reason = "the folder has no tokenizer's files" if empty else " ".join(str(error).split())[:300]
            raise DataError(
                f"no tokenizer could be read from {model.path}: set policy.path (or rm.base.path) to a folder with a "
                f"model and its tokenizer, or to a hub id that can be reached ({reason})"
            ) from None
        self._template = ChatTemplate(self.hf, model)
        self.generation_settings = read_generation_settings(model)
        """Of the model's generation_config.json; empty where it has none."""
        self._encoder = TextEncoder(self.hf, self._control_tokens)
        if model.pad_token is not None:
            self._set_pad_token(model.pad_token)

    @cached_property
    def eot_id(self) -> int:
        """The token that ends a response; DataError where the template does not tell it."""
        return self._single_id(self._template.layout.end)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens at which sampling stops, in ascending order: the end of turn, EOS, those of generation_config.json."""
        return sorted(self._ends | set(end_ids(self.generation_settings)))

    @cached_property
    def pad_id(self) -> int:
        """The token that fills rows; DataError where there is none that does not end turns."""
        # Padding with EOS hides real ends of turns wherever pads are masked by id.
        if self.hf.pad_token_id is None or self.hf.pad_token_id in self._ends:
            taken = {*self._ends, *end_ids(self.generation_settings), *self._question_ids}
            token = spare_token(self.hf, taken)
            if token is None:
                fault = (
                    "no pad token"
                    if self.hf.pad_token is None
                    else f"a pad token that ends turns ({self.hf.pad_token})"
                )
                raise DataError(
                    f"{self.name} has {fault}, and none that can take its place: name one of its special tokens in "
                    "policy.pad_token (or rm.base.pad_token)"
                )
            self.hf.pad_token = token
        return self.hf.pad_token_id

    def check(self) -> None:
        """DataError where a conversation is not `prompt_ids + response_ids`, or rows cannot be filled."""
        self._template.layout.check(self.name)
        _ = self.stop_ids, self.eot_id, self.pad_id

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a prompt with the header of the response."""
        self._template.layout.check(self.name)
        return self._rendered_ids(messages, add_generation_prompt=True)

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a response and its end of turn."""
        if not isinstance(text, str):
            raise DataError(f"a response must be a text, not {type(text).__name__}")
        self._template.layout.check(self.name)
        lead, hidden = self._template.layout.lead, self._encoder.hide(text)
        if not lead or text.startswith(lead):
            return [*self._encoder.encode(hidden), self.eot_id]
        # Behind its header, since some tokenizers join a space to what follows it only there.
        header = self._template.layout.generation_prompt
        before, whole = self._encoder.encode(header), self._encoder.encode(header + lead + hidden)
        fits = whole[: len(before)] == before
        return [*(whole[len(before) :] if fits else self._encoder.encode(lead + hidden)), self.eot_id]

    def rendered_ids(self, text: str) -> list[int]:
        """Tokens of a text that already contains the special tokens of the template; none is added."""
        return self._encoder.encode_as_it_is(text)

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a prompt and the response to it; the last token is the end of turn."""
        response = response_of(messages)
        return self.prompt_ids(messages[:-1]) + self.response_ids(response)

    def whole_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the template's whole rendering, without a generation prompt; BOS comes from the template only."""
        return self._rendered_ids(messages, add_generation_prompt=False)

    def moves_system(self, messages: Sequence[Message]) -> bool:
        """Whether the text of the system turn is put before the first user turn of these messages."""
        return self._template.moves_system(messages)

    def assistant_spans(
        self, prompt: Sequence[Message], option: str = "rm.variants.*.regularise"
    ) -> list[tuple[int, int]]:
        """[start, stop) in `prompt_ids(prompt)` of every assistant turn, its end of turn included.

        Args:
            option: that asks for them; for the message.

        Raises:
            DataError: a template that renders earlier turns of the assistant differently from generated ones.
        """
        whole, spans = self.prompt_ids(prompt), []
        for i, message in enumerate(prompt):
            if message["role"] != "assistant":
                continue
            start, turn = len(self.prompt_ids(prompt[:i])), self.response_ids(message["content"])
            if whole[start : start + len(turn)] != turn:
                raise DataError(
                    f"{self.name}: its chat template does not render the assistant's turn {message['content']!r} as it "
                    f"was generated: set {option} to last, or use another template"
                )
            spans.append((start, start + len(turn)))
        return spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens and without the token that sampling stopped at."""
        ends = ids and ids[-1] in self._ends.union(end_ids(self.generation_settings))
        return self.hf.decode(ids[:-1] if ends else ids, skip_special_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of vocabulary and template: models with the same fingerprint read the same tokens."""
        eot_id, pad_id = (value_or_none(lambda: self.eot_id), value_or_none(lambda: self.pad_id))
        parts = [sorted(self.hf.get_vocab().items()), self.hf.chat_template, pad_id, eot_id]
        return digest([*parts, settings] if (settings := self._template.settings) else parts)

    def _set_pad_token(self, token: str) -> None:
        known = {t.content: i for i, t in added_tokens(self.hf).items()}
        if token not in known or known[token] in self.stop_ids:
            fault = "ends turns" if token in known else "is none of its special tokens"
            raise DataError(f"{self.name}: pad_token {token!r} {fault}; it has {', '.join(list(known)[:20])}")
        if known[token] in self._question_ids:
            raise DataError(f"{self.name}: pad_token {token!r} is written in every prompt, so it cannot fill rows")
        self.hf.pad_token = token

    @cached_property
    def _question_ids(self) -> list[int]:
        """Tokens of a prompt, with those that the template writes in each."""
        return value_or_none(lambda: self._rendered_ids(QUESTION, add_generation_prompt=True)) or []

    @cached_property
    def _ends(self) -> set[int]:
        """End of turn and EOS, as far as there are any."""
        return {value_or_none(lambda: self.eot_id), self.hf.eos_token_id} - {None}

    def _control_tokens(self) -> set[str]:
        rendered = value_or_none(lambda: self._template.render(QUESTION, add_generation_prompt=False)) or ""
        return control_tokens(self.hf, {*self._ends, *end_ids(self.generation_settings)}, rendered)

    def _rendered_ids(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        check_types(messages)
        messages = self._template.system_in_place(messages)
        hidden = [{**m, "content": self._encoder.hide(m["content"])} for m in messages]
        return self._encoder.encode(self._template.render(hidden, add_generation_prompt=add_generation_prompt))

    def _single_id(self, end: str | None) -> int:
        """The token that a response is ended with: the first one of what the template writes after it."""
        if end is None:
            raise DataError(f"{self.name} has no end of turn: its template writes none, and its tokenizer has no EOS")
        ids = self._encoder.encode(end)
        if len(ids) > 1 and ids[0] not in added_tokens(self.hf):
            raise DataError(
                f"{self.name}: the end of turn {end!r} does not begin with a token of its own but is {ids}: give a "
                "template that ends turns with a special token (chat_template)"
            )
        return ids[0]
