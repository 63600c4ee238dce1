"""Control tokens that stand in someone's text are text: they are encoded as such, wherever the text is put."""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

from core.errors import DataError

OPEN, CLOSE = "\U0010fff0", "\U0010fff1"
"""Around the number of a hidden control token. Both are private-use characters, which no text needs."""
HIDDEN = re.compile(f"{OPEN}(\\d+){CLOSE}")
RENAMED = f"\U0010fff2{secrets.token_hex(16)}.{{}}\U0010fff3"
"""Name of a control token in the tokenizer that encodes hidden ones. It differs in each process, so that nobody can
write it in a text."""


class TextEncoder:
    """Encodes rendered conversations; control tokens that `hide` found in contents come out as ordinary text.

    A chat template puts contents between its own control tokens, so the two must be told apart before it runs: `hide`
    replaces each control token in a content by a mark, the template renders the marked content, and `encode` gives the
    text in place of the marks to a tokenizer that does not know control tokens by their usual names. Conversations
    without marks are encoded as ever.

    Args:
        hf: a tokenizer of transformers.
        control: gives the control tokens; called when they are first needed.
    """

    def __init__(self, hf: Any, control: Callable[[], Collection[str]]):
        self._hf, self._get_control = hf, control

    def hide(self, text: str) -> str:
        """The text with a mark in place of each control token in it, and of each beginning of a mark."""
        return self._hideable.sub(lambda found: f"{OPEN}{self._hidden.index(found[0])}{CLOSE}", text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with marks; nothing is added at its ends."""
        if not HIDDEN.search(text):
            return self.encode_as_it_is(text)
        check_unicode(text)
        # First the control tokens of the template, which then no longer look like those of the contents.
        text = self._pattern.sub(lambda found: RENAMED.format(self._control.index(found[0])), text)
        text = HIDDEN.sub(lambda found: self._named(int(found[1]), found[0]), text)
        tokenizer, id_of = self._renamed
        return [id_of.get(i, i) for i in tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_as_it_is(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is hidden: its control tokens are control tokens."""
        try:
            return self._hf(text, add_special_tokens=False).input_ids
        except (TypeError, UnicodeEncodeError):
            check_unicode(text)
            raise

    @cached_property
    def _control(self) -> list[str]:
        return sorted(self._get_control(), key=lambda token: (-len(token), token))

    @cached_property
    def _hidden(self) -> list[str]:
        """What marks stand for."""
        return [*self._control, OPEN]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._control)) or r"(?!)")  # the longest first

    @cached_property
    def _hideable(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._hidden)))

    def _named(self, number: int, mark: str) -> str:
        return self._hidden[number] if number < len(self._hidden) else mark

    @cached_property
    def _renamed(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with other names for its control tokens, and which of its ids stand for which.

        Raises:
            DataError: a tokenizer that is not one of the `tokenizers` library.
        """
        from tokenizers import Tokenizer

        backend = getattr(self._hf, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"the text contains a control token ({', '.join(self._control[:3])}, ...), which "
                f"{type(self._hf).__name__} cannot read as text: use the fast form of this tokenizer, or leave it out"
            )
        name_of = {token: RENAMED.format(i) for i, token in enumerate(self._control)}
        tokenizer = Tokenizer.from_str(json.dumps(_with_names(json.loads(backend.to_str()), name_of)))
        old = self._hf.get_vocab()
        ids = ((tokenizer.token_to_id(new), old[token]) for token, new in name_of.items() if token in old)
        return tokenizer, {new: id_ for new, id_ in ids if new is not None}


def check_unicode(*texts: str) -> None:
    """DataError for half of a surrogate pair, which JSON can contain but UTF-8 cannot."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise DataError("not valid Unicode") from None


def _with_names(content: dict[str, Any], name_of: dict[str, str]) -> dict[str, Any]:
    """The content of tokenizer.json with other names for some tokens, in the vocabulary and among the added ones."""
    content = copy.copy(content) | {"post_processor": None, "truncation": None, "padding": None}
    rename = lambda token: name_of.get(token, token)  # noqa: E731
    content["added_tokens"] = [token | {"content": rename(token["content"])} for token in content["added_tokens"]]
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename(token): i for token, i in model["vocab"].items()}
    else:  # Unigram: a list of (token, score)
        model["vocab"] = [[rename(token), score] for token, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = rename(model["unk_token"])
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not _makes(m, name_of)]
    return content | {"model": model}


def _makes(merge: Any, name_of: dict[str, str]) -> bool:
    """Whether a merge of BPE reads or makes a renamed token; it is written as a list of two, or with a space."""
    left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
    return bool({left, right, left + right} & name_of.keys())
