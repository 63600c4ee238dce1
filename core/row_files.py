"""Rows of the files that users bring: JSON Lines, JSON, CSV and Parquet, compressed or not.

They are read here and not by `datasets`, which stops at the first broken line of a file, gives all rows the columns of
the first ones, guesses the types of CSV cells (a response "1984" becomes a number), and writes a copy of every file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from core.errors import ArtefactError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Formats of rows: JSON Lines, a JSON array of objects or JSON Lines, CSV with a header, Parquet."""
COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""What may follow the suffix of a text format, as in `.jsonl.gz`."""
MOST_CELL = 2**31 - 1
"""Longest cell of a CSV file in characters. The limit of Python's reader, 131,072, is below long conversations."""
BATCH_ROWS = 1024
"""Rows of a Parquet file that are in memory at a time."""


class Fault(NamedTuple):
    """What is wrong with a row: the kind of fault, and details of this one."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


def numbered_rows(
    path: Path, on_fault: Callable[[int, str], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file in one of SUFFIXES, read as they are needed; in JSON Lines the number of the line.

    Text formats may be compressed, as in `.jsonl.gz`.

    Args:
        on_fault: called with the number and the kind of fault of a row that cannot be read, which is then skipped.
            Without it, such a row is an ArtefactError.

    Raises:
        ArtefactError: no such file, a folder, another suffix, or a file that cannot be read at all.
    """
    if path.is_dir():
        raise ArtefactError(f"{path} is a folder: give a {_either(SUFFIXES)} file")
    if not path.is_file():
        raise ArtefactError(f"no file {path}")
    readers = dict(zip(SUFFIXES, (_json_lines, _json_rows, _csv_rows, _parquet_rows), strict=True))
    if (suffix := format_of(path)) is None:
        raise ArtefactError(f"{path}: give a {_either(SUFFIXES)} file")
    unit = "line" if suffix == ".jsonl" else "row"
    for number, value in readers[suffix](path):
        if isinstance(value, dict):
            yield number, value
            continue
        fault = value if isinstance(value, Fault) else Fault("not an object", f"but {type(value).__name__}")
        if on_fault is None:
            raise ArtefactError(f"{path}, {unit} {number}: {fault}")
        on_fault(number, fault.kind)


def format_of(path: Path) -> str | None:
    """Which of SUFFIXES a file has before that of a compression; None for another one."""
    compressed = path.suffix in COMPRESSIONS
    suffix = Path(path.stem).suffix if compressed else path.suffix
    return suffix if suffix in SUFFIXES and not (compressed and suffix == ".parquet") else None


def _opened(path: Path) -> IO[bytes]:
    return COMPRESSIONS.get(path.suffix, open)(path, "rb")


def _either(suffixes: tuple[str, ...]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def parsed(data: bytes) -> Any:
    """A JSON value, or the fault of its text."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Fault("not JSON", str(error))


def _textual(value: Any, data: bytes) -> Any:
    """`value` as parsed from `data`, or a fault where a text in it is half a pair of surrogates (`"\\ud83d"`).

    Python makes a text of it that nothing can write, encode or tokenize.
    """
    if b"\\ud" not in data and b"\\uD" not in data:
        return value
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return Fault("not valid Unicode", str(error))
    return value


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                yield number, _textual(parsed(line), line)


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        for line in file:  # noqa: UP028, `yield from` closes the file when the caller stops early
            yield line
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise ArtefactError(f"{path}: cannot be unpacked ({error})") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON array, or of JSON Lines where the first line with text is an object of its own."""
    with _opened(path) as file:
        lines = enumerate(_lines(file, path), start=1)
        number, first = next(((n, line) for n, line in lines if line.strip()), (1, b""))
        rows = parsed(first)
        if isinstance(rows, dict) and _list_in(rows) is None:
            yield number, _textual(rows, first)
            yield from ((n, _textual(parsed(line), line)) for n, line in lines if line.strip())
            return
        rest = b"".join(line for _, line in lines)
        if rest.strip() and not isinstance(rows, dict):
            rows = parsed(first + rest)
    if isinstance(rows, Fault):
        raise ArtefactError(f"{path}: {rows}")
    if not isinstance(rows, list):
        hint = f": make the array in {name!r} the whole file" if (name := _list_in(rows)) else ""
        raise ArtefactError(f"{path}: holds a {type(rows).__name__}; a .json file must hold an array of rows{hint}")
    yield from ((n, _textual(row, first + rest)) for n, row in enumerate(rows, start=1))


def _list_in(value: Any) -> str | None:
    """The only key of an object that holds rows under it, as in {"data": [...]}; messages are no rows."""
    name, rows = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (None, None)
    if not isinstance(rows, list) or not rows:
        return None
    return name if all(isinstance(row, dict) and row.keys().isdisjoint({"role", "from"}) for row in rows) else None


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MOST_CELL)
    with _opened(path) as file:
        rows, number = csv.DictReader(_decoded(_lines(file, path), path)), 0
        try:
            _check_header(list(rows.fieldnames or ()), path)
            for number, row in enumerate(rows, start=1):
                yield number, Fault("more cells than the header has") if None in row else row
        except csv.Error as error:
            raise ArtefactError(f"{path}, row {number + 1}: not CSV ({error})") from None


def _check_header(names: list[str], path: Path) -> None:
    """ArtefactError for a header that no row can be read by."""
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise ArtefactError(f"{path}: two columns are named {', '.join(map(repr, twice))}: rename or remove one")
    mark = next((mark for mark in ";\t|" if mark in names[0]), None) if len(names) == 1 else None
    if mark is not None:
        raise ArtefactError(f"{path}: the header is one column, {names[0]!r}: separate columns by commas, not {mark!r}")


def _decoded(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ArtefactError(f"{path}, line {number}: not UTF-8 ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(path)
        _check_header(table.schema_arrow.names, path)
        rows = (row for batch in table.iter_batches(BATCH_ROWS) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{path}, after row {number}" if number else str(path)
        raise ArtefactError(f"{where}: not Parquet, or cut short ({error})") from None
