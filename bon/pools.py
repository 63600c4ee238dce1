"""Pools of scored samples, joined by id and checked, which all analyses of best-of-n read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bon.estimators import Array
from core.errors import ArtefactError
from core.files import digest, join


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
    responses: tuple[tuple[str, ...], ...] | None = field(default=None, repr=False)
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


def from_tables(
    samples: Sequence[Mapping],
    gold: Sequence[Mapping],
    proxies: Mapping[str, Sequence[Mapping]],
    second_gold: Sequence[Mapping] | None = None,
) -> Pools:
    """Pools from tables like those of stage `bon`: samples (`SampleRow`) and their scores (`ScoreRow`).

    Of `samples` only prompt_id and sample_id are needed; n_tokens, logp_sampler, prompt and response are optional.

    Raises:
        ArtefactError: tables that do not join, with counts; pools of different sizes; what `Pools` refuses.
    """
    samples = sorted(samples, key=lambda row: (row["prompt_id"], row["sample_id"]))
    if (
        any("text_sha" in rows[0] for rows in (gold, second_gold, *proxies.values()) if rows)
        and "response" in samples[0]
    ):
        # So that `join` refuses scores of other texts under the same ids.
        samples = [{"text_sha": digest(row["response"]), **row} for row in samples]
    ids = tuple(dict.fromkeys(row["prompt_id"] for row in samples))
    sizes = {i: 0 for i in ids}
    for row in samples:
        sizes[row["prompt_id"]] += 1
    if len(kinds := sorted(set(sizes.values()))) != 1:
        few = min(sizes, key=sizes.__getitem__)
        raise ArtefactError(
            f"pools are ragged: {kinds[0]} to {kinds[-1]} samples a prompt, fewest at prompt {few}; the estimators "
            "need pools of equal size, so sample the missing ones or drop whole prompts"
        )
    shape = (len(ids), kinds[0])

    def scores(name: str, rows: Sequence[Mapping]) -> Array:
        try:
            joined = join(samples, rows)
        except ArtefactError as error:
            raise ArtefactError(f"scores of {name}: {error}") from None
        return np.array([row["score"] for row in joined], dtype=np.float64).reshape(shape)

    def column(name: str) -> Array | None:
        if name not in samples[0]:
            return None
        return np.array([row[name] for row in samples], dtype=np.float64).reshape(shape)

    first = [samples[k * shape[1]] for k in range(shape[0])]
    texts = [row["response"] for row in samples] if "response" in samples[0] else None
    return Pools(
        ids,
        scores("gold", gold),
        {name: scores(name, rows) for name, rows in proxies.items()},
        second_gold=scores("the second gold", second_gold) if second_gold else None,
        length=column("n_tokens"),
        logp=column("logp_sampler"),
        prompts=tuple(row["prompt"][-1]["content"] for row in first) if "prompt" in first[0] else None,
        responses=tuple(tuple(texts[k * shape[1] : (k + 1) * shape[1]]) for k in range(shape[0])) if texts else None,
    )
