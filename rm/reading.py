"""Which tokens of a conversation a reward model reads. Its reward is read at the last of them.

Models of this project (`end_of_turn`) read the tokens of the prompt and of the response, as the policy makes them, and
nothing after the end of turn. Models of other code read the conversation as the chat template renders it as a whole.
Templates such as ChatML's and Gemma's write a newline after the end of turn, so that is another token. Who writes BOS,
the template or the tokenizer, differs too:

    whole           special tokens of the tokenizer are added, but no second BOS: RewardBench's own pipeline and the
                    model cards of classifiers, which remove the BOS that the template and the tokenizer both write
    whole_as_text   special tokens of the tokenizer are added to the rendered text, a second BOS included: the GRM
                    authors' training, their model cards, and the text-classification pipeline of transformers
    whole_template  only what the template writes: `apply_chat_template(tokenize=True)`

The three are equal where the tokenizer adds nothing, as those of Qwen and SmolLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, TypedDict

from core.data.chat import ChatTokenizer, Message, conversation, response_of
from core.data.rows import ResponseRow
from core.errors import DataError

Reads = Literal["end_of_turn", "whole", "whole_as_text", "whole_template"]

Tokens = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt, which may be empty, and the response to it; the reward is read at the last token."""

_PROBE = conversation([{"role": "user", "content": "Question"}], "A probe response")


class Reader:
    """Conversations and sampled responses as the tokens that one reward model reads."""

    def __init__(self, tokenizer: ChatTokenizer, reads: Reads = "end_of_turn"):
        self.tokenizer, self.reads = tokenizer, reads
        self._last_prompt: tuple[list[Message] | None, tuple[int, ...]] = (None, ())

    def conversation(self, messages: Sequence[Message]) -> Tokens:
        """Tokens of a conversation given as text; DataError when it does not end with the assistant."""
        response = response_of(messages)
        if self.reads == "end_of_turn":
            return self._prompt_ids(messages[:-1]), tuple(self.tokenizer.response_ids(response))
        whole = self._with_special_tokens(self.tokenizer.whole_ids(messages))
        if self._after_the_end is not None:
            # Where the rendering begins with the prompt's, that is computed once for all its responses.
            prompt = self.opened(self._prompt_ids(messages[:-1]))
            if whole[: len(prompt)] == prompt and len(prompt) < len(whole):
                return prompt, whole[len(prompt) :]
        return (), whole

    def row(self, row: ResponseRow) -> Tokens:
        """Tokens of a response as they were sampled, where `token_ids` are of this model's tokenizer; else of its text.

        So a response that was cut off has no end of turn, special tokens that were sampled are there, and nothing is
        tokenised again. A model that reads the whole rendering gets what its template writes after the end of turn.
        """
        ids = sampled_ids(row, self.tokenizer)
        if ids is None:
            return self.conversation(conversation(row["prompt"], row["response"]))
        prompt = self._prompt_ids(row["prompt"])
        if self.reads == "end_of_turn":
            return prompt, tuple(ids)
        if self._after_the_end is None:
            return self.conversation(conversation(row["prompt"], row["response"]))
        return self.opened(prompt), self.closed(ids)

    def opened(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The tokens of a prompt, begun as this model reads them."""
        return self._with_special_tokens(prompt, closed=False)

    def closed(self, response: Sequence[int], *, opens: bool = False) -> tuple[int, ...]:
        """The tokens of a response, ended as this model reads them: only an end of turn has something after it.

        Args:
            opens: the tokens are of the prompt too.
        """
        end = self._after_the_end if response[-1] == self.tokenizer.eot_id and self.reads != "end_of_turn" else None
        return (*(self.opened(response) if opens else response), *(end or ()))

    def _prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a prompt, kept for the next call, since the responses to one prompt mostly follow each other."""
        last, ids = self._last_prompt
        if last != list(messages):
            ids = tuple(self.tokenizer.prompt_ids(messages))
            self._last_prompt = ([dict(m) for m in messages], ids)
        return ids

    @cached_property
    def _after_the_end(self) -> tuple[int, ...] | None:
        """What the template writes after the end of turn; None if it renders a response otherwise than sampled."""
        try:
            whole, begin = self.tokenizer.whole_ids(_PROBE), self.tokenizer.conversation_ids(_PROBE)
        except DataError:  # answers do not extend the generation prompt, or have no one end of turn
            return None
        if whole[: len(begin)] != begin:
            return None
        return (*whole[len(begin) :], *self._special_tokens[1])

    @cached_property
    def _special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer adds before and after every text, as these models read it."""
        if self.reads in ("end_of_turn", "whole_template"):
            return (), ()
        text = self.tokenizer.hf("a", add_special_tokens=False).input_ids
        padded = self.tokenizer.hf("a").input_ids
        start = next(i for i in range(len(padded)) if padded[i : i + len(text)] == text)
        return tuple(padded[:start]), tuple(padded[start + len(text) :])

    def _with_special_tokens(self, ids: Sequence[int], *, closed: bool = True) -> tuple[int, ...]:
        before, after = self._special_tokens
        bos = self.tokenizer.hf.bos_token_id
        if self.reads == "whole" and before[-1:] == (bos,) and ids and ids[0] == bos:
            before = before[:-1]
        return (*before, *ids, *(after if closed else ()))


def sampled_ids(row: ResponseRow, tokenizer: ChatTokenizer) -> list[int] | None:
    """The tokens of a response as it was sampled; None where they are not known, or are of another tokenizer."""
    ids = row.get("token_ids")
    return list(ids) if ids and row.get("tokenizer") == tokenizer.fingerprint else None


class TextReading(TypedDict):
    """What the text of sampled responses does not show, where a model of another tokenizer scores their text."""

    responses: int
    special_tokens: int
    """Responses with special tokens before their end of turn, which their text leaves out."""
    retokenised: int
    """Other responses whose text has other tokens than those that were sampled."""
    cut_off: int
    """Responses that did not end by themselves; a text is scored with an end of turn."""


def text_reading(tokenizer: ChatTokenizer, rows: Sequence[ResponseRow]) -> TextReading:
    """Counts over the responses with `token_ids`.

    Args:
        tokenizer: of the policy that sampled them.
    """
    special = {i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    counts: TextReading = {"responses": 0, "special_tokens": 0, "retokenised": 0, "cut_off": 0}
    for row in rows:
        if not (ids := list(row.get("token_ids") or ())):
            continue
        finished = ids[-1] in tokenizer.stop_ids
        said = ids[:-1] if finished else ids
        counts["responses"] += 1
        counts["cut_off"] += not finished
        if special & set(said):
            counts["special_tokens"] += 1
        elif tokenizer.response_ids(row["response"])[:-1] != said:
            counts["retokenised"] += 1
    return counts


def describe(counts: TextReading) -> str:
    """One sentence for the log."""
    return (
        f"of {counts['responses']} responses, {counts['special_tokens']} lack special tokens that were "
        f"sampled, {counts['retokenised']} have other tokens, {counts['cut_off']} do not show that they were cut off"
    )
