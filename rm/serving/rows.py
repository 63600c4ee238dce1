"""The rows of a request as tokens; a row that cannot be scored is reported with its number."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from core.config.spelling import edit_distance
from core.data.chat import check_prompt, conversation, response_of
from core.data.literal import check_unicode
from core.data.rows import ResponseRow
from core.errors import DataError
from rm.reading import Reader, Tokens


class BadRequest(DataError):
    """A fault of the client: HTTP 400."""


class RowReader:
    """Bodies of requests -> tokens; threads may share it.

    Args:
        reader: of the served model.
        max_tokens: of a row, prompt and response together.
    """

    def __init__(self, reader: Reader, max_tokens: int = sys.maxsize):
        self.reader, self.tokenizer, self.max_tokens = reader, reader.tokenizer, max_tokens
        self._lock = threading.Lock()  # a fast tokenizer fails if two threads use it at once
        hf = self.tokenizer.hf
        self._pad = hf.pad_token if hf.pad_token_id != hf.bos_token_id else None

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """Tokens that end turns, and pads."""
        tokenizer = self.tokenizer
        ids = (tokenizer.eot_id, tokenizer.pad_id, *tokenizer.stop_ids)
        return tuple(dict.fromkeys(tokenizer.hf.convert_ids_to_tokens(i) for i in ids))

    @cached_property
    def _starts_with_bos(self) -> bool:
        bos = self.tokenizer.hf.bos_token_id
        return bos is not None and self.tokenizer.prompt_ids([{"role": "user", "content": "Question"}])[0] == bos

    def conversations(self, body: Any) -> list[Tokens]:
        """Rows of `{"conversations": [[{role, content}, ...], ...]}`; each must end with the assistant.

        With `token_ids`, a list as long, and `tokenizer`, the fingerprint that they are of, the last response of row i
        is read as the tokens `token_ids[i]`, not as its text; null for text.

        Raises:
            BadRequest: names `conversations[i]`; an unknown key.
        """
        rows = _list(body, "conversations", ("conversations", "token_ids", "tokenizer"))
        ids, tokenizer = _ids(body, len(rows)), body.get("tokenizer")
        if any(ids) and tokenizer != self.tokenizer.fingerprint:
            raise BadRequest(f"token_ids are of the tokenizer {tokenizer!r}, not of {self.tokenizer.fingerprint}")
        return [
            self._row(f"conversations[{i}]", partial(self._conversation, row, own))
            for i, (row, own) in enumerate(zip(rows, ids, strict=True))
        ]

    def queries(self, body: Any) -> list[Tokens]:
        """Rows of OpenRLHF's `{"query": [...], "prompts": [...] or null, "labels": ...}`.

        A query is prompt and response in one string, rendered by the chat template. If it begins with `prompts[i]`,
        prompt and response are tokenised separately, as everywhere in this project, and a prompt is computed once for
        all its responses. Otherwise the whole string is one row. It begins with the BOS of the template and no other.
        Pads and ends of turns after the response are replaced by the one end of turn that the reward is read at, and
        by what the template writes after it if the model reads the whole rendering.

        Raises:
            BadRequest: names `query[i]`; an unknown key.
        """
        rows = _list(body, "query", ("query", "prompts", "labels"))
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
        except DataError as error:
            raise BadRequest(f"{name}: {error}") from None
        if (length := len(row[0]) + len(row[1])) > self.max_tokens:
            raise BadRequest(f"{name}: {length} tokens, but the model takes {self.max_tokens}")
        return row

    def _conversation(self, messages: object, token_ids: list[int] | None) -> Tokens:
        if not isinstance(messages, list) or len(messages) < 2:
            raise DataError("a conversation must be a list of at least two messages")
        for message in messages:
            if isinstance(message, dict):
                _check_keys(message, ("role", "content"))
        prompt, response = check_prompt(messages[:-1]), response_of(messages)
        check_unicode(response)
        if token_ids is None:
            return self.reader.conversation(conversation(prompt, response))
        if token_ids and max(token_ids) >= len(self.tokenizer.hf):
            raise DataError(f"token {max(token_ids)} is not in a vocabulary of {len(self.tokenizer.hf)}")
        fingerprint = self.tokenizer.fingerprint
        row: ResponseRow = {"prompt": prompt, "response": response, "token_ids": token_ids, "tokenizer": fingerprint}
        return self.reader.row(row)

    def _query(self, query: object, prompt: object) -> Tokens:
        if not isinstance(query, str) or not query.strip():
            raise DataError("a query must be a non-empty string")
        check_unicode(query, prompt if isinstance(prompt, str) else "")
        while self._pad and query.startswith(self._pad):
            query = query.removeprefix(self._pad)
        query = self._without_ends(query)
        if not query.strip():
            raise DataError("a query needs text other than pads and ends of turns")
        if isinstance(prompt, str) and prompt and query.startswith(prompt):
            before, after = self.tokenizer.rendered_ids(prompt), self.tokenizer.rendered_ids(query.removeprefix(prompt))
        else:
            before, after = [], self.tokenizer.rendered_ids(query)
        if set(before) | set(after) <= {self.tokenizer.hf.bos_token_id}:
            raise DataError("a query needs text other than pads and ends of turns")
        if not before:
            return (), self.reader.closed((*self._with_bos(after), self.tokenizer.eot_id), opens=True)
        return self.reader.opened(self._with_bos(before)), self.reader.closed((*after, self.tokenizer.eot_id))

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


def _list(body: object, key: str, known: Sequence[str]) -> list:
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object with a list {key!r}")
    try:
        _check_keys(body, known)
    except DataError as error:
        raise BadRequest(str(error)) from None
    if not isinstance(body.get(key), list):
        raise BadRequest(f"the body must be a JSON object with a list {key!r}")
    return body[key]


def _ids(body: dict, count: int) -> list[list[int] | None]:
    """`token_ids` of the body, or None for each row."""
    rows = body.get("token_ids")
    if rows is None:
        return [None] * count
    if not isinstance(rows, list) or len(rows) != count:
        raise BadRequest(f"token_ids must be a list as long as conversations, which has {count} rows")
    for i, ids in enumerate(rows):
        if ids is not None and not (ids and isinstance(ids, list) and all(type(t) is int and t >= 0 for t in ids)):
            raise BadRequest(f"token_ids[{i}] must be null, or a list of one or more numbers of tokens")
    return rows


def _check_keys(given: dict, known: Sequence[str]) -> None:
    """DataError for a key that is not read; it names the one that was most likely meant."""
    if unknown := [key for key in given if key not in known]:
        meant = min(known, key=lambda key: edit_distance(unknown[0], key))
        raise DataError(f"unknown key {unknown[0]!r}: did you mean {meant!r}? Known are {', '.join(known)}")
