"""Rows of tables by their ids, as [prompts, samples]: one sort a table, and no Python object a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.column_files import Names
from core.errors import ArtefactError

Whole = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Keys:
    """Which sample each row of a table is of, [rows]."""

    prompts: Names
    samples: Whole

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Keys:
        """Of rows with prompt_id and sample_id."""
        places: dict[str, int] = {}
        codes = [places.setdefault(row["prompt_id"], len(places)) for row in rows]
        samples = np.array([row["sample_id"] for row in rows], dtype=np.int64)
        return cls(Names(list(places), np.array(codes, dtype=np.int32)), samples)


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of pools of one size, sorted by prompt id and sample id."""

    keys: Keys
    """Of the table that says which samples there are."""
    ids: tuple[str, ...]
    """[P]"""
    order: Whole
    """[P, N]: their rows in that table."""

    @classmethod
    def of(cls, keys: Keys) -> Samples:
        """ArtefactError: a sample that is there twice, or prompts with different numbers of samples."""
        ids = sorted(keys.prompts.distinct)
        prompts = _codes(keys, ids)
        order = np.lexsort((keys.samples, prompts))
        counts = np.bincount(prompts, minlength=len(ids))
        if counts.min() != counts.max():
            raise ArtefactError(
                f"pools are ragged: {counts.min()} to {counts.max()} samples a prompt, fewest at prompt "
                f"{ids[int(counts.argmin())]}; the estimators need pools of equal size, so sample the missing ones or "
                "drop whole prompts"
            )
        found = cls(keys, tuple(ids), order.reshape(len(ids), -1))
        numbers = keys.samples[found.order]
        if twice := int((np.diff(numbers, axis=1) == 0).sum()):
            raise ArtefactError(f"{twice} samples are doubled: prompt_id and sample_id must name one row")
        return found

    @property
    def shape(self) -> tuple[int, int]:
        return self.order.shape

    def rows(self, keys: Keys) -> Whole:
        """[P, N]: the row of each sample in another table.

        Raises:
            ArtefactError: a sample without a row, a row without a sample, or the same one twice; with counts.
        """
        if keys is self.keys:
            return self.order
        place = {name: i for i, name in enumerate(self.ids)}
        if len(keys.samples) == self.order.size and place.keys() >= set(keys.prompts.distinct):
            prompts = _codes(keys, self.ids)
            order = np.lexsort((keys.samples, prompts))
            wanted = np.repeat(np.arange(len(self.ids)), self.shape[1])
            same = np.array_equal(prompts[order], wanted)
            if same and np.array_equal(keys.samples[order], self.keys.samples[self.order].ravel()):
                return order.reshape(self.shape)
        raise ArtefactError(self._fault(keys))

    def _fault(self, keys: Keys) -> str:
        names = list(dict.fromkeys((*self.ids, *keys.prompts.distinct)))
        left = list(zip(_codes(self.keys, names).tolist(), self.keys.samples.tolist(), strict=True))
        right = list(zip(_codes(keys, names).tolist(), keys.samples.tolist(), strict=True))
        has, wanted = set(right), set(left)
        missing = [key for key in left if key not in has]
        first = [(names[prompt], sample) for prompt, sample in missing[:1]]
        return (
            f"tables do not join on prompt_id, sample_id: {len(missing)} rows without a partner (first {first}), "
            f"{len(has - wanted)} partners unused, {len(right) - len(has)} duplicate ids"
        )


def _codes(keys: Keys, ids: Sequence[str]) -> Whole:
    """Places of the rows' prompts in `ids`."""
    place = {name: i for i, name in enumerate(ids)}
    return np.array([place[name] for name in keys.prompts.distinct], dtype=np.int64)[keys.prompts.codes]
