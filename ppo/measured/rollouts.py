"""`rollouts/step-*.parquet`: every response of a step with what PPO knew of it, of as many of the last steps as fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.data.rows import RolloutRow
from core.files import write_table

if TYPE_CHECKING:  # `grm samples` reads these tables, and should not wait for torch
    from torch import Tensor

    from ppo.records import Micro, Rollout

FOLDER = "rollouts"
MIB = 1 << 20


def completed(rollout: Rollout) -> list[dict[str, Any]]:
    """The rows of this rank's responses (`core.data.rows.RolloutRow`), once the advantages are there."""
    rows = [dict(row) for row in rollout.samples]
    for m in rollout.micros:
        for b, number in enumerate(m.rows.tolist()):
            advantages = _of(m, m.advantages, b)
            rows[number] |= {
                "logprobs": _of(m, m.logprobs, b),
                "ref_logprobs": _of(m, m.ref_logprobs, b),
                "reward": float(m.reward[b]),
                "advantage_mean": float(advantages.mean()),
                "advantage_min": float(advantages.min()),
                "advantage_max": float(advantages.max()),
            }
    return rows


def _of(m: Micro, values: Tensor, b: int) -> np.ndarray:
    """[response tokens] of one row, float32: half the size of Python's numbers, and all the digits that there are."""
    return values[b][m.is_response[b]].float().cpu().numpy()


class RolloutTables:
    """The tables of one run.

    Args:
        out: folder of the run.
        most_mib: the oldest tables are deleted when all together are larger; 0 keeps none at all.
    """

    def __init__(self, out: Path, most_mib: float):
        self._folder, self._most = out / FOLDER, most_mib * MIB

    @property
    def are_kept(self) -> bool:
        return self._most > 0

    def forget_after(self, step: int) -> None:
        """Delete the tables of later steps, which a resumed run writes again."""
        for later, file in tables(self._folder).items():
            if later > step:
                file.unlink()

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the table of a step, then delete the oldest ones until what is left fits. The last one always stays."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_table(self._folder / f"step-{step:06d}.parquet", rows, RolloutRow)
        found = list(tables(self._folder).values())
        sizes = [file.stat().st_size for file in found]
        while len(found) > 1 and sum(sizes) > self._most:
            found.pop(0).unlink()
            sizes.pop(0)


def tables(folder: Path) -> dict[int, Path]:
    """The tables in a folder by their step, in its order."""
    files = folder.glob("step-*.parquet") if folder.is_dir() else ()
    return dict(sorted((int(file.stem.split("-")[1]), file) for file in files))
