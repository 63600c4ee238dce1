"""Messages, conversations and the chat template: the only place where text becomes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from core.config import Model
from core.errors import DataError
from core.files import digest

Message = dict[str, str]
"""`{"role": ..., "content": ...}`"""


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


def check_unicode(*texts: str) -> None:
    """DataError for half of a surrogate pair, which JSON can contain but UTF-8 cannot."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise DataError("not valid Unicode") from None


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
    """A tokenizer with its chat template, checked once.

    A conversation is `prompt_ids(prompt) + response_ids(response)`. These are the tokens that the policy generates, and
    the policy, reward models and the critic all read them. BOS comes from the template only. What a template lacks for
    that is an error when it is asked for, so that `whole_ids` works with every template.

    Raises:
        DataError: no chat template. Of the methods: a pad token that ends turns; a template whose rendering of a
            conversation does not begin with its rendering of the prompt.
    """

    def __init__(self, model: Model):
        from transformers import AutoTokenizer

        self.name = model.path
        self.hf = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if not self.hf.chat_template:
            raise DataError(
                f"{model.path} has no chat template: set `chat_template` in its tokenizer, or use a chat model"
            )

    @cached_property
    def eot_id(self) -> int:
        """The token that ends a response; DataError where the template does not tell it."""
        return self._single_id(self._end_of_turn())

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens at which sampling stops, in ascending order."""
        eos = self.hf.eos_token_id
        return sorted({self.eot_id} if eos is None else {self.eot_id, eos})

    @cached_property
    def pad_id(self) -> int:
        """The token that fills rows; DataError where there is none that does not end turns."""
        ends = self._known_ends()
        if self.hf.pad_token_id is None or self.hf.pad_token_id in ends:
            # Padding with EOS hides real ends of turns wherever pads are masked by id.
            unused = self.hf.unk_token_id
            if unused is None or unused in ends:
                raise DataError(
                    f"{self.name}: the pad token ({self.hf.pad_token!r}) ends turns; set another in its tokenizer"
                )
            self.hf.pad_token = self.hf.unk_token
        return self.hf.pad_token_id

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a prompt with the header of the response; DataError where answers do not extend it."""
        _ = self.eot_id  # checks that the template renders an answer after its generation prompt
        return self._encode(self._render(messages, add_generation_prompt=True))

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a response and its end of turn."""
        return [*self._encode(text), self.eot_id]

    def rendered_ids(self, text: str) -> list[int]:
        """Tokens of a text that already contains the special tokens of the template; none is added."""
        return self._encode(text)

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a prompt and the response to it; the last token is the end of turn."""
        response = response_of(messages)
        return self.prompt_ids(messages[:-1]) + self.response_ids(response)

    def whole_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the template's whole rendering, without a generation prompt; BOS comes from the template only."""
        return self._encode(self._render(messages, add_generation_prompt=False))

    def assistant_spans(self, prompt: Sequence[Message]) -> list[tuple[int, int]]:
        """[start, stop) in `prompt_ids(prompt)` of every assistant turn, its end of turn included.

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
                    "was generated: set rm.variants.*.regularise to last, or use another template"
                )
            spans.append((start, start + len(turn)))
        return spans

    def decode(self, ids: Sequence[int]) -> str:
        return self.hf.decode(ids, skip_special_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of vocabulary and template: models with the same fingerprint read the same tokens."""
        try:
            eot_id = self.eot_id
        except DataError:  # the whole rendering of a conversation can be read all the same
            eot_id = None
        return digest([sorted(self.hf.get_vocab().items()), self.hf.chat_template, self.pad_id, eot_id])

    def _known_ends(self) -> set[int]:
        """Tokens that end turns, as far as the template tells them."""
        try:
            return set(self.stop_ids)
        except DataError:
            return {self.hf.eos_token_id} - {None}

    def _encode(self, text: str) -> list[int]:
        return self.hf(text, add_special_tokens=False).input_ids

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)

    def _end_of_turn(self) -> str:
        """What the template writes after a response, from a probe conversation."""
        question, response = [{"role": "user", "content": "Question"}], "A probe response"
        prompt = self._render(question, add_generation_prompt=True)
        full = self._render(conversation(question, response), add_generation_prompt=False)
        if not full.startswith(prompt + response):
            raise DataError(
                f"{self.name}: its chat template renders a response differently from its generation prompt, so a "
                "response cannot be scored as it was generated; use a template in which one begins with the other"
            )
        return full[len(prompt + response) :].strip() or self.hf.eos_token

    def _single_id(self, token: str) -> int:
        ids = self._encode(token)
        if len(ids) != 1:
            raise DataError(f"{self.name}: the end of turn {token!r} is not one token but {ids}")
        return ids[0]
