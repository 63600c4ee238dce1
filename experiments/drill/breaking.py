"""Damage to files, as disks, copies and people do it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

HOWS = (
    "cut short", "emptied", "deleted", "flipped in one bit", "renamed", "a copy added", "a folder in its place",
    "swapped with another",
)  # fmt: skip


def pick(files: Sequence[Path], rng: random.Random) -> Path:
    """A file of the folder: every kind, which is told by the end of the name, is as likely as another."""
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kinds.setdefault(file.name if file.name == "manifest.json" else file.suffix, []).append(file)
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def damage(file: Path, others: Sequence[Path], how: str, rng: random.Random) -> tuple[str, list[Path]]:
    """Damage `file` in one of HOWS; what was done, and the paths at which something is not as it was.

    Args:
        others: further files of the same folder; one of the same kind is what the file is swapped with.
    """
    data = file.read_bytes()
    alike = [o for o in others if o.suffix == file.suffix and o.read_bytes() != data]
    if how == "swapped with another" and alike:
        return _swap(file, rng.choice(alike))
    if how == "renamed":
        new = file.rename(file.with_name(f"old-{file.name}"))
        return f"{file.name} renamed", [file, new]
    if how == "a copy added":
        new = Path(shutil.copy(file, file.with_name(f"copy-{file.name}")))
        return f"a copy of {file.name} added", [new]
    if how == "a folder in its place":
        file.unlink()
        file.mkdir()
    elif how == "deleted" or not data:
        how = "deleted"
        file.unlink()
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "cut short":
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        at, changed = rng.randrange(len(data)), bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        how = f"flipped in one bit of byte {at} of {len(data)}"
    return f"{file.name} {how}", [file]


def _swap(first: Path, second: Path) -> tuple[str, list[Path]]:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    return f"{first.name} and {second.parent.name}/{second.name} swapped", [first, second]
