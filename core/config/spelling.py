"""How much two names are alike."""

from __future__ import annotations

from collections.abc import Sequence


def alike(a: str, b: str, farthest: float) -> float:
    """From 0 to 1, which is the same; 0 for more than `farthest` edits a letter."""
    edits = edit_distance(a, b) / max(len(a), len(b))
    return 1 - edits if edits <= farthest else 0.0


def edit_distance(a: str, b: str) -> int:
    """Letters to insert, delete or replace, or neighbours to swap, that make `a` of `b`."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, before, row = before, row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(row[-1] + 1, before[j] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]


def nearest_name(wrong: str, known: Sequence[str]) -> str | None:
    """The one of `known` names that is most like `wrong`; None when none is near."""
    likeness = {name: alike(wrong.lower(), name.lower(), 0.5) for name in known}
    best = max(known, key=likeness.__getitem__, default=None)
    return best if best is not None and likeness[best] else None
