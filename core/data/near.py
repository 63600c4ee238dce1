"""Prompts that repeat others, or nearly do: a model that has seen the others has seen them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from core.data.chat import Message
from core.data.splits import normalised

NEAR = 0.8
"""Jaccard similarity of word trigrams from which two prompts are near-duplicates."""

Trigrams = set[tuple[str, ...]]


class Known:
    """Prompts that were seen. System messages, which many prompts share, are not compared."""

    def __init__(self, prompts: Iterable[Sequence[Message]]):
        self._texts: set[str] = set()
        self._trigrams: list[Trigrams] = []
        self._where: dict[tuple[str, ...], list[int]] = {}
        for number, messages in enumerate(prompts):
            self._texts.add(normalised(messages))
            self._trigrams.append(_trigrams(messages))
            for gram in self._trigrams[-1]:
                self._where.setdefault(gram, []).append(number)

    def repeated_by(self, messages: Sequence[Message]) -> Literal["exactly", "nearly"] | None:
        """Whether a prompt repeats one of them: but for case, space and punctuation, or with word trigrams that are
        alike by `NEAR` or more."""
        if normalised(messages) in self._texts:
            return "exactly"
        grams = _trigrams(messages)
        shared = Counter(number for gram in grams for number in self._where.get(gram, ()))
        alike = any(n / len(grams | self._trigrams[number]) >= NEAR for number, n in shared.items())
        return "nearly" if alike else None


def _trigrams(messages: Sequence[Message]) -> Trigrams:
    words = re.findall(r"\w+", " ".join(m["content"] for m in messages if m["role"] != "system").lower())
    return {tuple(words[k : k + 3]) for k in range(max(1, len(words) - 2))}
