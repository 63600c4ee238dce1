"""Scores whose samples have no ids: the text of a sample within its prompt is its id.

Equal texts of a prompt are one sample that was drawn several times. They get the mean of their scores, which differ by
rounding only, so that best-of-n takes them for the tie that they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bon.estimators import Array
from bon.pools import Pools, Responses
from core.column_files import Names
from core.errors import ArtefactError

TOLERANCE = 0.05
"""In standard deviations of gold: two scores of one text that differ by more are of two golds, or of other texts."""


@dataclass(eq=False)
class Scored:
    """Samples of one file [rows], with the scores that it has of them."""

    prompts: Names
    texts: NDArray[np.uint64]
    """Digests of the responses."""
    gold: Array
    proxies: dict[str, Array]
    length: NDArray[np.int64] | None = None
    """In characters."""
    responses: Any = None
    """A list or an Arrow array of texts, for display."""
    shown: dict[str, str] | None = field(default=None, repr=False)
    """Prompt id -> its text, for display."""


def pools_by_text(files: Mapping[str, Scored]) -> Pools:
    """Pools of several files about the same samples, each with proxies of its own.

    Samples are put in the order of their digests, so that the order of a file, which may be sorted by a proxy, is lost.

    Raises:
        ArtefactError: files about other samples than the first one; golds that differ; pools of different sizes.
    """
    (first, one), *rest = files.items()
    ids = sorted(one.prompts.distinct)
    order, shape = _order(one, ids, first)
    prompts, texts = _sorted_keys(one, ids, order)
    starts = np.flatnonzero(np.concatenate(([True], (np.diff(prompts) != 0) | (texts[1:] != texts[:-1]))))
    mean = lambda values: _block_means(values, starts).reshape(shape)  # noqa: E731
    gold = mean(one.gold[order])
    proxies = {name: mean(values[order]) for name, values in one.proxies.items()}
    for name, other in rest:
        if sorted(other.prompts.distinct) != ids:
            differ = len(set(ids) ^ set(other.prompts.distinct))
            raise ArtefactError(f"{name} and {first} are not about the same prompts: {differ} are in one of them only")
        rows, _ = _order(other, ids, name)
        found = _sorted_keys(other, ids, rows)
        if len(found[0]) != len(prompts) or (differ := int((found[1] != texts).sum())):
            raise ArtefactError(f"{name} and {first} are not about the same responses: {differ} of {len(texts)} differ")
        gap = np.abs(mean(other.gold[rows]) - gold)
        if off := int((gap > TOLERANCE * gold.std()).sum()):
            raise ArtefactError(
                f"gold of {name} and of {first} differ on {off} of {gold.size} responses: give one gold"
            )
        for proxy, values in other.proxies.items():
            if proxy in proxies:
                raise ArtefactError(f"two proxies are named {proxy}: one is of {name}")
            proxies[proxy] = mean(values[rows])
    return Pools(
        tuple(ids), gold, proxies,
        length=None if one.length is None else one.length[order].astype(float).reshape(shape),
        prompts=None if one.shown is None else tuple(one.shown[i] for i in ids),
        responses=None if one.responses is None else Responses(one.responses, order.reshape(shape)),
    )  # fmt: skip


def codes_in(prompts: Names, ids: list[str]) -> NDArray[np.int64]:
    """Places [rows] in `ids`."""
    place = {name: i for i, name in enumerate(ids)}
    return np.array([place[name] for name in prompts.distinct], dtype=np.int64)[prompts.codes]


def _order(one: Scored, ids: list[str], name: str) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """The rows of a file by prompt and digest, and [P, N]."""
    prompts = codes_in(one.prompts, ids)
    counts = np.bincount(prompts, minlength=len(ids))
    if counts.min() != counts.max():
        raise ArtefactError(
            f"pools of {name} are ragged: {counts.min()} to {counts.max()} samples a prompt, fewest at prompt "
            f"{ids[int(counts.argmin())]}; the estimators need pools of equal size"
        )
    return np.lexsort((one.texts, prompts)), (len(ids), int(counts[0]))


def _sorted_keys(one: Scored, ids: list[str], order: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    return codes_in(one.prompts, ids)[order], one.texts[order]


def _block_means(values: Array, starts: NDArray[np.int64]) -> Array:
    """Each value replaced by the mean of its block; blocks begin at `starts`."""
    sizes = np.diff(np.append(starts, len(values)))
    means: Array = np.repeat(np.add.reduceat(values, starts) / sizes, sizes)
    return means
