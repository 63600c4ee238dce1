"""Pools of scored samples, joined by id and checked, which all analyses of best-of-n read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bon.estimators import Array
from bon.joining import Keys, Samples, Whole
from core.errors import ArtefactError
from core.files import digest


@dataclass(frozen=True, slots=True)
class Pools:
    """P prompts with N samples each. Every [P, N] array has the same prompts and samples in the same places.

    Raises:
        ArtefactError: different shapes, scores that are not finite, or gold scores that equal those of a proxy.
    """

    prompt_ids: tuple[str, ...]
    """[P], unique."""
    gold: Array
    proxies: dict[str, Array]
    """Name of a reward model -> its rewards."""
    second_gold: Array | None = None
    """Scores of another gold reward model, to see whether a verdict depends on the gold."""
    length: Array | None = None
    """Length of each response, in tokens, words or characters, but in one unit."""
    logp: Array | None = None
    """Log-probability of each response under the sampler, in nats."""
    prompts: tuple[str, ...] | None = None
    """[P], the last user turn of each, for display."""
    responses: Sequence[Sequence[str]] | None = field(default=None, repr=False)
    """[P][N], for display."""
    of_reference: bool = True
    """Whether the samples are from the distribution that policies start from: PPO's temperature, all tokens."""

    def __post_init__(self) -> None:
        if self.gold.ndim != 2 or self.gold.shape[0] != len(self.prompt_ids):
            raise ArtefactError(f"gold has shape {self.gold.shape} for {len(self.prompt_ids)} prompts: pass [P, N]")
        if len(set(self.prompt_ids)) != len(self.prompt_ids):
            raise ArtefactError(f"{len(self.prompt_ids) - len(set(self.prompt_ids))} prompt ids are duplicates")
        columns = {
            "gold": self.gold, **self.proxies, "second gold": self.second_gold, "length": self.length, "logp": self.logp
        }  # fmt: skip
        for name, values in columns.items():
            if values is None:
                continue
            if values.shape != self.gold.shape:
                raise ArtefactError(f"{name} has shape {values.shape}, gold {self.gold.shape}: join them by id first")
            if bad := np.argwhere(~np.isfinite(values)).tolist():
                prompt, sample = bad[0]
                raise ArtefactError(
                    f"{len(bad)} of {values.size} scores of {name} are NaN or infinite, the first is of prompt "
                    f"{self.prompt_ids[prompt]}, sample {sample}: score again; leaving rows out would change the pools"
                )
        golds = [gold for gold in (self.gold, self.second_gold) if gold is not None]
        if self.second_gold is not None and np.array_equal(self.gold, self.second_gold):
            raise ArtefactError("the second gold scores exactly as the first, so it adds nothing: use another one")
        if same := [name for name, values in self.proxies.items() if any(np.array_equal(values, g) for g in golds)]:
            raise ArtefactError(
                f"{', '.join(same)} scores exactly as gold does: a gold that is also the proxy measures nothing"
            )

    @property
    def size(self) -> int:
        """N."""
        return self.gold.shape[1]


@dataclass(frozen=True, eq=False)
class Scores:
    """A column of scores, one a row."""

    keys: Keys
    values: Array
    texts: np.ndarray | None = None
    """What was scored, or its digest; compared with the samples' own."""


@dataclass(frozen=True, eq=False)
class Responses(Sequence[tuple[str, ...]]):
    """[P] of the N responses of a prompt, taken from a column when they are looked at."""

    texts: Any
    """[rows], a list or an Arrow array."""
    rows: Whole
    """[P, N], places in `texts`."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, prompt):
        found = [self.texts[row] for row in self.rows[prompt].tolist()]
        return tuple(text if isinstance(text, str) else text.as_py() or "" for text in found)


def from_columns(
    keys: Keys,
    gold: Scores,
    proxies: Mapping[str, Scores],
    second_gold: Scores | None = None,
    *,
    texts: np.ndarray | None = None,
    length: np.ndarray | None = None,
    logp: np.ndarray | None = None,
    prompts: Mapping[str, str] | None = None,
    responses: Any = None,
) -> Pools:
    """Pools from columns: a column of scores has keys of its own, the others are of the rows of `keys`.

    Args:
        texts: what the samples are, to be compared with what was scored.
        prompts: prompt id -> its text.
        responses: a list or an Arrow array of texts.

    Raises:
        ArtefactError: columns that do not join, with counts; pools of different sizes; what `Pools` refuses.
    """
    samples, proxies = Samples.of(keys), dict(proxies)

    def table(name: str, scores: Scores) -> Array:
        try:
            rows = samples.rows(scores.keys)
        except ArtefactError as error:
            raise ArtefactError(f"scores of {name}: {error}") from None
        if texts is not None and scores.texts is not None and scores.texts is not texts:
            differ = np.argwhere(scores.texts[rows] != texts[samples.order])
            if len(differ):
                prompt, sample = differ[0]
                first = (samples.ids[prompt], int(keys.samples[samples.order[prompt, sample]]))
                raise ArtefactError(
                    f"scores of {name}: {len(differ)} ids name different texts in the two tables (first {first})"
                )
        return np.asarray(scores.values, dtype=np.float64)[rows]

    column = lambda values: None if values is None else np.asarray(values, dtype=np.float64)[samples.order]  # noqa: E731
    return Pools(
        samples.ids,
        table("gold", gold),
        {name: table(name, proxies.pop(name)) for name in list(proxies)},  # a column that was placed is let go
        second_gold=table("the second gold", second_gold) if second_gold else None,
        length=column(length),
        logp=column(logp),
        prompts=None if prompts is None else tuple(prompts[i] for i in samples.ids),
        responses=None if responses is None else Responses(responses, samples.order),
    )


def from_tables(
    samples: Sequence[Mapping],
    gold: Sequence[Mapping],
    proxies: Mapping[str, Sequence[Mapping]],
    second_gold: Sequence[Mapping] | None = None,
) -> Pools:
    """Pools from tables like those of stage `bon`: samples (`SampleRow`) and their scores (`ScoreRow`).

    Of `samples` only prompt_id and sample_id are needed; n_tokens, logp_sampler, prompt and response are optional.

    Raises:
        ArtefactError: as `from_columns`.
    """
    tables = [rows for rows in (gold, second_gold, *proxies.values()) if rows]
    hashed = any("text_sha" in rows[0] for rows in tables)
    kind = "text_sha" if hashed else "response"

    def texts(rows: Sequence[Mapping]) -> np.ndarray | None:
        if kind in rows[0]:
            return np.array([row[kind] for row in rows], dtype=object)
        if "response" in rows[0] and rows is samples:  # so that scores of other texts under the same ids are refused
            return np.array([digest(row["response"]) for row in rows], dtype=object)
        return None

    def scores(rows: Sequence[Mapping]) -> Scores:
        return Scores(Keys.of(rows), np.array([row["score"] for row in rows], dtype=np.float64), texts(rows))

    column = lambda name: np.array([row[name] for row in samples]) if name in samples[0] else None  # noqa: E731
    return from_columns(
        Keys.of(samples),
        scores(gold),
        {name: scores(rows) for name, rows in proxies.items()},
        scores(second_gold) if second_gold else None,
        texts=texts(samples),
        length=column("n_tokens"),
        logp=column("logp_sampler"),
        prompts={row["prompt_id"]: row["prompt"][-1]["content"] for row in samples} if "prompt" in samples[0] else None,
        responses=[row["response"] for row in samples] if "response" in samples[0] else None,
    )
