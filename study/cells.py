"""Values in the rows of other tools; one that is missing or of another kind is an error that names the row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from core.errors import ArtefactError


class Cells(NamedTuple):
    """A row of a file. Numbers may be texts, as all values of CSV files are.

    The methods raise ArtefactError.
    """

    values: Mapping[str, Any]
    number: int
    """Of the row, from 1."""

    def given(self, column: str) -> Any:
        if column not in self.values:
            raise ArtefactError(f"row {self.number} has no {column}")
        return self.values[column]

    def text(self, column: str) -> str:
        value = self.given(column)
        return value if isinstance(value, str) else self._refuse(column, "a text")

    def identity(self, column: str) -> str:
        """An id, which may be a number."""
        value = self.given(column)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            self._refuse(column, "an id")
        return str(value)

    def real(self, column: str) -> float:
        """A finite number."""
        return self._real(column, self.given(column))

    def _real(self, column: str, value: Any) -> float:
        try:
            found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            found = None
        if found is None:
            raise ArtefactError(f"row {self.number}: {column} is {_short(value)}, not a number")
        if not math.isfinite(found):
            raise ArtefactError(f"row {self.number}: {column} is {found}; score again")
        return found

    def whole(self, column: str) -> int:
        """A whole number, which may be a text or 3.0."""
        value = self.real(column)
        return int(value) if value.is_integer() and abs(value) < 2**53 else self._refuse(column, "a whole number")

    def texts(self, column: str) -> list[str]:
        value = self.given(column)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self._refuse(column, "a list of texts")
        return value

    def reals(self, column: str) -> list[float]:
        value = self.given(column)
        if not isinstance(value, list):
            self._refuse(column, "a list of numbers")
        return [self._real(column, one) for one in value]

    def prompt(self, column: str) -> list[dict[str, Any]]:
        """A prompt as messages; a text is one user turn."""
        value = self.given(column)
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        is_chat = (
            isinstance(value, list)
            and bool(value)
            and all(
                isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
                for turn in value
            )
        )
        return value if is_chat else self._refuse(column, "a text or a list of messages")

    def _refuse(self, column: str, kind: str) -> Any:
        raise ArtefactError(f"row {self.number}: {column} is {_short(self.values[column])}, not {kind}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 60 else shown[:60] + "..."
