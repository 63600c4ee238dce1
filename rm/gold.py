"""Gold reward models: nothing is optimised against them, and every result is measured by them.

`judge` is the offline default. It reads texts only, never the weights of the policy. Its constants below are fixed, so
that the scores of all runs are in the same unit. A score is the sum of these terms (English text is assumed):

    relevance    cosine of the MiniLM embeddings of the last user message and the response
    echo         share of the response's word trigrams that also occur in that message; negative
    fluency      mean of: ends with terminal punctuation; share of alphabetic words; no very long sentence
    repetition   the larger of: share of bigrams seen before, share of sentences seen before; negative
    length       1 - exp(-words / LENGTH_SCALE): further words count less and less

A response without words gets EMPTY_SCORE instead.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from core import starting
from core.batching import by_length
from core.config import Gold
from core.data.chat import ChatTokenizer, Message, conversation, response_of
from core.data.rows import ResponseRow
from core.data.streams import stream_seed
from core.errors import DataError
from core.files import digest
from rm.model import RewardModel
from rm.reading import TextReading, describe, text_reading

Conversation = Sequence[Message]

# Chosen once on samples of SmolLM2-135M-Instruct: relevance makes up about half of the difference within a pair,
# fluency a third, and longer responses win about as often as shorter ones.
RELEVANCE_WEIGHT = 2.0
ECHO_WEIGHT = 2.0
FLUENCY_WEIGHT = 2.0
REPETITION_WEIGHT = 4.0
LENGTH_WEIGHT = 1.2
LENGTH_SCALE = 12.0
"""Words after which 63% of the length term is reached."""
LONG_SENTENCE = 30
"""Words of a sentence that is not too long; for longer ones this part of fluency is LONG_SENTENCE / words."""
EMPTY_SCORE = -2.0
"""Below the score of a response that repeats one word twelve times."""

EMBEDDING_TOKENS = 256
"""Longest text that the embedding model was trained on; it does not read the rest of a text."""
CHUNK = 256
"""Conversations between two updates of the progress bar."""


class GoldModel(Protocol):
    def score(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """float64 [n], finite."""
        ...

    def score_rows(self, rows: Sequence[ResponseRow]) -> np.ndarray:
        """As `score`, of sampled responses: by their tokens if gold has the policy's tokenizer, else by their text."""
        ...


class _OfTexts(ABC):
    """Gold that reads texts."""

    @abstractmethod
    def score(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """As `GoldModel.score`."""

    def score_rows(self, rows: Sequence[ResponseRow]) -> np.ndarray:
        return self.score([conversation(row["prompt"], row["response"]) for row in rows])


def load_gold(cfg: Gold) -> GoldModel:
    """The gold reward model of a configuration; DataError for `linear`, which is built in code."""
    if cfg.kind == "judge":
        return Judge(cfg.path, cfg.batch_tokens)
    if cfg.kind in ("checkpoint", "hub"):
        return TrainedGold(cfg.path, cfg.batch_tokens)
    raise DataError("gold.kind linear can only be built in code (rm.gold.LinearGold): use judge, hub or checkpoint")


def score_samples(gold: GoldModel, samples: Sequence[ResponseRow], progress: tqdm | None = None) -> np.ndarray:
    """Gold of the samples, float64 [n].

    Args:
        progress: a bar of the caller's; by default there is one on these samples.
    """
    starting.working()
    parts = []
    own = tqdm(total=len(samples), desc="gold", unit="sample") if progress is None else nullcontext(progress)
    with own as bar:
        for start in range(0, len(samples), CHUNK):
            chunk = samples[start : start + CHUNK]
            parts.append(gold.score_rows(chunk))
            bar.update(len(chunk))
    return np.concatenate(parts)


def reading(gold: GoldModel, policy: ChatTokenizer, rows: Sequence[ResponseRow]) -> TextReading | None:
    """What gold does not see of sampled responses because it reads their text; None where it reads their tokens.

    Args:
        policy: the tokenizer of the policy that sampled them.
    """
    if isinstance(gold, TrainedGold) and gold.model.tokenizer.fingerprint == policy.fingerprint:
        return None
    return text_reading(policy, rows)


def with_reading(metrics: dict, gold: GoldModel, policy: ChatTokenizer, rows: Sequence[ResponseRow]) -> dict:
    """The metrics of a stage with `gold_reads_text`, and with a sentence on it in their `headline`."""
    counts = reading(gold, policy, rows)
    more = {"headline": f"{metrics['headline']}; gold reads text: {describe(counts)}"} if counts else {}
    return metrics | more | {"gold_reads_text": counts}


class TrainedGold:
    """A trained reward model, from the hub or a folder, as gold."""

    def __init__(self, path: str, batch_tokens: int):
        self.batch_tokens = batch_tokens
        self.model = RewardModel.from_pretrained(path, lm_head=False)

    def score(self, conversations: Sequence[Conversation]) -> np.ndarray:
        scores = self.model.score(conversations, batch_tokens=self.batch_tokens)
        return _checked(scores.double().cpu().numpy(), conversations)

    def score_rows(self, rows: Sequence[ResponseRow]) -> np.ndarray:
        return self.model.score_rows(rows, batch_tokens=self.batch_tokens).double().cpu().numpy()


@dataclass(frozen=True)
class LinearGold(_OfTexts):
    """gold = slope * proxy + noise * N(0, 1), where the text seeds the draw. E[gold | proxy] is known, for tests."""

    proxy: Callable[[Conversation], float]
    slope: float
    noise: float
    seed: int = 0

    def score(self, conversations: Sequence[Conversation]) -> np.ndarray:
        return _checked(np.array([self._one(c) for c in conversations], dtype=np.float64), conversations)

    def _one(self, messages: Conversation) -> float:
        text = digest([[m["role"], m["content"]] for m in messages])
        draw = np.random.default_rng(stream_seed(self.seed, "linear gold", text)).standard_normal()
        return self.slope * self.proxy(messages) + self.noise * draw


class Judge(_OfTexts):
    """The built-in scorer; see the top of this file for its terms."""

    def __init__(self, path: str, batch_tokens: int):
        self._embed = Embedder(path, batch_tokens)

    def score(self, conversations: Sequence[Conversation]) -> np.ndarray:
        scores = np.array([sum(terms.values()) for terms in self.components(conversations)], dtype=np.float64)
        return _checked(scores, conversations)

    def components(self, conversations: Sequence[Conversation]) -> list[dict[str, float]]:
        """The weighted terms of each conversation; they sum to its score."""
        prompts = [_last_user(c) for c in conversations]
        responses = [response_of(c) for c in conversations]
        similarity = self._cosines(prompts, responses)
        return [_terms(p, r, float(s)) for p, r, s in zip(prompts, responses, similarity, strict=True)]

    def _cosines(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """[n] cosines; each distinct text is embedded once, because the samples of a prompt share it."""
        texts = sorted({*prompts, *responses})
        vectors = self._embed(texts)
        row = {text: i for i, text in enumerate(texts)}
        left, right = vectors[[row[p] for p in prompts]], vectors[[row[r] for r in responses]]
        return (left * right).sum(axis=1)


class Embedder:
    """Sentence embeddings: the normalised mean of the last hidden states."""

    def __init__(self, path: str, batch_tokens: int):
        from transformers import AutoModel, AutoTokenizer

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, dtype=torch.float32).eval().to(self.device)
        self.batch_tokens = batch_tokens

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [n, H], each row of length 1."""
        if not texts:
            return np.zeros((0, self.model.config.hidden_size))
        ids = self.tokenizer(list(texts), truncation=True, max_length=EMBEDDING_TOKENS).input_ids
        vectors = np.empty((len(ids), self.model.config.hidden_size))
        for batch in by_length([len(x) for x in ids], self.batch_tokens):
            inputs = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(self.device)
            states = self.model(**inputs).last_hidden_state.double()  # [B, T, H]
            mask = inputs["attention_mask"].unsqueeze(-1)
            pooled = (states * mask).sum(1) / mask.sum(1)
            vectors[batch] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return vectors


def _terms(prompt: str, response: str, cosine: float) -> dict[str, float]:
    words = _words(response)
    if not words:
        return {"empty": EMPTY_SCORE}
    sentences = [s for part in re.split(r"(?<=[.!?])\s+|\n+", response) if (s := _words(part))]
    return {
        "relevance": RELEVANCE_WEIGHT * cosine,
        "echo": -ECHO_WEIGHT * _echo(_words(prompt), words),
        "fluency": FLUENCY_WEIGHT * _fluency(response, words, sentences),
        "repetition": -REPETITION_WEIGHT * max(_repeated(_ngrams(words, 2)), _repeated([tuple(s) for s in sentences])),
        "length": LENGTH_WEIGHT * (1.0 - float(np.exp(-len(words) / LENGTH_SCALE))),
    }


def _words(text: str) -> list[str]:
    """Lower-case words (letters, digits, inner apostrophes and hyphens)."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _echo(prompt: list[str], response: list[str]) -> float:
    known, said = set(_ngrams(prompt, 3)), _ngrams(response, 3)
    return sum(gram in known for gram in said) / len(said) if said else 0.0


def _fluency(text: str, words: list[str], sentences: list[list[str]]) -> float:
    ends = bool(re.search(r"[.!?][\"'”’)*\]]*\s*$", text))
    alphabetic = sum(re.sub(r"['’-]", "", word).isalpha() for word in words) / len(words)
    pace = min(1.0, LONG_SENTENCE / max(map(len, sentences)))
    return (ends + alphabetic + pace) / 3


def _repeated(items: list[tuple[str, ...]]) -> float:
    """Share of the items that occurred before."""
    return 1.0 - len(set(items)) / len(items) if items else 0.0


def _last_user(messages: Conversation) -> str:
    return next(m["content"] for m in reversed(messages) if m["role"] == "user")


def _checked(scores: np.ndarray, conversations: Sequence[Conversation]) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        text = repr([m["content"] for m in conversations[bad[0]]])[:400]
        count = f"{bad.size} of {len(scores)}"
        raise DataError(f"gold is not finite on {count} conversations; the first is number {bad[0]}: {text}")
    return scores
