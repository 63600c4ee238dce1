"""The rows of a request as tokens; a row that cannot be scored is reported with its number."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from jinja2 import TemplateError

from core.data.chat import ChatTokenizer, check_prompt, conversation, response_of
from core.errors import DataError
from rm.score import Tokens, tokens_of


class BadRequest(DataError):
    """A fault of the client: HTTP 400."""


class RowReader:
    """Bodies of requests -> tokens; threads may share it.

    Args:
        max_tokens: of a row, prompt and response together.
    """

    def __init__(self, tokenizer: ChatTokenizer, max_tokens: int = sys.maxsize):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self._lock = threading.Lock()  # a fast tokenizer fails if two threads use it at once
        hf = tokenizer.hf
        ends = (hf.convert_ids_to_tokens(i) for i in (tokenizer.eot_id, tokenizer.pad_id, *tokenizer.stop_ids))
        self._ends = tuple(dict.fromkeys(ends))
        self._pad = hf.pad_token if hf.pad_token_id != hf.bos_token_id else None
        probe = tokenizer.prompt_ids([{"role": "user", "content": "Question"}])
        self._starts_with_bos = hf.bos_token_id is not None and probe[0] == hf.bos_token_id

    def conversations(self, body: object) -> list[Tokens]:
        """Rows of `{"conversations": [[{role, content}, ...], ...]}`; each must end with the assistant.

        Raises:
            BadRequest: names `conversations[i]`.
        """
        rows = _list(body, "conversations")
        return [self._row(f"conversations[{i}]", partial(self._conversation, row)) for i, row in enumerate(rows)]

    def queries(self, body: Any) -> list[Tokens]:
        """Rows of OpenRLHF's `{"query": [...], "prompts": [...] or null, "labels": ...}`.

        A query is prompt and response in one string, rendered by the chat template. If it begins with `prompts[i]`,
        prompt and response are tokenised separately, as everywhere in this project, and a prompt is computed once for
        all its responses. Otherwise the whole string is one row. It begins with the BOS of the template and no other.
        Pads and ends of turns after the response are replaced by the one end of turn that the reward is read at.

        Raises:
            BadRequest: names `query[i]`.
        """
        rows = _list(body, "query")
        prompts = body.get("prompts") or [None] * len(rows)
        if not isinstance(prompts, list) or len(prompts) != len(rows):
            raise BadRequest(f"prompts must be a list as long as query, which has {len(rows)} rows")
        return [
            self._row(f"query[{i}]", partial(self._query, query, prompt))
            for i, (query, prompt) in enumerate(zip(rows, prompts, strict=True))
        ]

    def _row(self, name: str, read: Callable[[], Tokens]) -> Tokens:
        try:
            with self._lock:
                row = read()
        except (DataError, TemplateError) as error:
            raise BadRequest(f"{name}: {error}") from None
        if (length := len(row[0]) + len(row[1])) > self.max_tokens:
            raise BadRequest(f"{name}: {length} tokens, but the model takes {self.max_tokens}")
        return row

    def _conversation(self, messages: object) -> Tokens:
        if not isinstance(messages, list) or len(messages) < 2:
            raise DataError("a conversation must be a list of at least two messages")
        return tokens_of(self.tokenizer, conversation(check_prompt(messages[:-1]), response_of(messages)))

    def _query(self, query: object, prompt: object) -> Tokens:
        if not isinstance(query, str) or not query.strip():
            raise DataError("a query must be a non-empty string")
        while self._pad and query.startswith(self._pad):
            query = query.removeprefix(self._pad)
        query = self._without_ends(query)
        if isinstance(prompt, str) and prompt and query.startswith(prompt):
            before, after = self._with_bos(self.tokenizer.rendered_ids(prompt)), query.removeprefix(prompt)
            return tuple(before), tuple(self.tokenizer.response_ids(after))
        whole = self._with_bos(self.tokenizer.rendered_ids(query))
        if not whole:
            raise DataError("a query needs text other than pads and ends of turns")
        return (), (*whole, self.tokenizer.eot_id)

    def _without_ends(self, text: str) -> str:
        """The text without ends of turns. Spaces before them are part of the response, those after them are not."""
        while ends := [end for end in self._ends if text.rstrip().endswith(end)]:
            text = text.rstrip().removesuffix(ends[0])
        return text

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Exactly one BOS if the template writes one, however many the client removed or added."""
        bos = self.tokenizer.hf.bos_token_id
        if not self._starts_with_bos:
            return ids
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[start:]]


def _list(body: object, key: str) -> list:
    if not isinstance(body, dict) or not isinstance(body.get(key), list):
        raise BadRequest(f"the body must be a JSON object with a list {key!r}")
    return body[key]
