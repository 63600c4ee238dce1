"""Single columns of the files that users bring, as arrays: memory goes with the columns read, not with the file.

CSV, JSON Lines and Parquet are read by Arrow in pieces. What it refuses is read again row by row (`core.row_files`),
which either succeeds or says what is wrong with which row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import ArtefactError
from core.files import digest
from core.row_files import format_of, numbered_rows, opened

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["name", "whole", "number", "text", "length", "digest", "hex"]
"""name: a text that many rows share. whole: an integer. number: finite. text: any text. length: characters of a text.
digest: the first 64 bits of `core.files.digest` of a text; hex: the same, of a column that holds such digests."""
KEPT_BYTES = 1 << 26
"""Most bytes of a column of texts that are kept."""
PIECE_BYTES = 4 << 20
"""Of a file that Arrow reads at a time, some 32 times ahead; no row of a CSV or JSON Lines file may be longer."""
PIECE_ROWS = 1 << 14


@dataclass
class Names:
    """A column of texts that many rows share: each distinct text once, and its place for every row."""

    distinct: list[str] = field(default_factory=list)
    codes: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """[rows], places in `distinct`."""


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a file; ArtefactError for one without rows, or that cannot be read at all."""
    row = next(numbered_rows(path), None)
    if row is None:
        raise ArtefactError(f"{path}: holds no rows")
    return row[1]


def read_columns(path: Path, wanted: Mapping[str, tuple[str, Kind]]) -> dict[str, Any]:
    """Columns of all rows of a file.

    Args:
        wanted: name in the result -> column of the file, and what it is read as.

    Returns:
        `Names` of a name; int64 [rows] of a whole number or a length; float64 [rows] of a number; uint64 [rows] of
        digests; of a text an Arrow array, or None where that would take more than KEPT_BYTES.

    Raises:
        ArtefactError: names the file, the row and the column of what cannot be read, is missing or is not finite.
    """
    import pyarrow as pa

    first = first_row(path)
    if missing := dict.fromkeys(column for column, _ in wanted.values() if column not in first):
        raise ArtefactError(f"{path}: no column {', '.join(missing)}; it has {', '.join(first)}")
    kinds: dict[str, Kind] = {}
    for column, kind in wanted.values():
        kinds[column] = "text" if column in kinds and kinds[column] != kind else kind
    try:
        return _collected(_pieces(path, kinds, first), wanted, path)
    except pa.ArrowException:
        return _collected(_pieces_of_rows(path, kinds), wanted, path)


def pick(path: Path, column: str, rows: Sequence[int]) -> list[Any]:
    """The values of a column in some rows, which are numbered from 0; nothing else of the file is kept."""
    import pyarrow as pa

    try:
        return _picked(_untyped(path, column), rows)
    except (pa.ArrowException, UnicodeDecodeError):
        return _picked(([row.get(column)] for _, row in numbered_rows(path)), rows)


def _picked(pieces: Iterable[Any], rows: Sequence[int]) -> list[Any]:
    order = np.argsort(rows, kind="stable")
    wanted, found, begin, next_ = np.asarray(rows)[order], {}, 0, 0
    for piece in pieces:
        while next_ < len(wanted) and wanted[next_] < begin + len(piece):
            value = piece[int(wanted[next_] - begin)]
            found[int(order[next_])] = value.as_py() if hasattr(value, "as_py") else value
            next_ += 1
        begin += len(piece)
    return [found[i] for i in range(len(rows))]


def _collected(
    pieces: Iterator[dict[str, pa.Array]], wanted: Mapping[str, tuple[str, Kind]], path: Path
) -> dict[str, Any]:
    parts: dict[str, Any] = {name: [] for name in wanted}
    places: dict[str, dict[str, int]] = {name: {} for name in wanted}
    for piece in pieces:
        for name, (column, kind) in wanted.items():
            if parts[name] is not None:
                parts[name].append(_read(piece[column].cast(_arrow_type(kind)), kind, places[name], path, column))
            if kind == "text" and parts[name] and sum(part.nbytes for part in parts[name]) > KEPT_BYTES:
                parts[name] = None
    columns: dict[str, Any] = {}
    for name, (column, kind) in wanted.items():
        whole = parts.pop(name)  # so that the pieces of one column only are there twice
        if kind == "text":
            columns[name] = None if whole is None else _joined(whole)
            continue
        columns[name] = np.concatenate(whole)
        if kind == "name":
            columns[name] = Names(list(places[name]), columns[name])
        elif kind == "number":
            _check_finite(columns[name], path, column)
    return columns


def _joined(texts: list[pa.Array]) -> pa.ChunkedArray:
    import pyarrow as pa

    return pa.chunked_array(texts, pa.large_string())


def _read(found: pa.Array, kind: Kind, places: dict[str, int], path: Path, column: str) -> Any:
    found.validate(full=True)  # Arrow's readers let broken UTF-8 pass
    if kind == "name":
        return _codes(found, places, path, column)
    if kind == "length":
        return _lengths(found)
    if kind == "digest":
        return np.array([int(digest(text or ""), 16) for text in found.to_pylist()], dtype=np.uint64)
    if kind == "hex":
        return np.array([int(text, 16) for text in found.to_pylist()], dtype=np.uint64)
    return found if kind == "text" else _numbers(found)


def _arrow_type(kind: Kind) -> pa.DataType:
    import pyarrow as pa

    return {"whole": pa.int64(), "number": pa.float64()}.get(kind, pa.large_string())


def _codes(found: pa.Array, places: dict[str, int], path: Path, column: str) -> NDArray[np.int32]:
    if found.null_count:
        raise ArtefactError(f"{path}: {column} is missing in {found.null_count} rows")
    coded = found.dictionary_encode()
    here = np.array([places.setdefault(name, len(places)) for name in coded.dictionary.to_pylist()], dtype=np.int32)
    codes: NDArray[np.int32] = here[coded.indices.to_numpy(zero_copy_only=False)]
    return codes


def _lengths(found: pa.Array) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    lengths: NDArray[np.int64] = pc.utf8_length(found).fill_null(0).cast("int64").to_numpy(zero_copy_only=False)
    return lengths


def _numbers(found: pa.Array) -> NDArray:
    import pyarrow as pa

    if found.null_count and found.type == pa.int64():
        raise pa.ArrowInvalid("a whole number is missing")  # the row is named by the second way to read
    return found.to_numpy(zero_copy_only=False).copy()  # a view would keep the whole piece


def _check_finite(values: NDArray[np.float64], path: Path, column: str) -> None:
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        raise ArtefactError(f"{path.name}, row {bad[0] + 1}: {column} is {values[bad[0]]}; score again")


def _pieces(path: Path, kinds: Mapping[str, Kind], first: Mapping[str, Any]) -> Iterator[dict[str, pa.Array]]:
    """Pieces of a file by Arrow: column -> array."""
    import pyarrow as pa

    suffix = format_of(path)
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(PIECE_ROWS, columns=list(kinds)):
            yield {column: batch[column] for column in kinds}
        return
    if suffix == ".json":
        raise pa.ArrowInvalid("Arrow reads no arrays of JSON")
    for batch in _csv(path, kinds) if suffix == ".csv" else _json_lines(path, kinds, first):
        yield {column: batch[column] for column in kinds}


def _untyped(path: Path, column: str) -> Iterator[pa.Array]:
    """Pieces of one column, of whatever type it has."""
    import pyarrow as pa

    first = first_row(path)
    if format_of(path) == ".csv":
        yield from (batch[column] for batch in _csv(path, {column: "text"}))
    elif format_of(path) == ".jsonl" and isinstance(first[column], str):
        yield from (batch[column] for batch in _json_lines(path, {column: "text"}, first))
    elif format_of(path) == ".parquet":
        yield from (piece[column] for piece in _pieces(path, {column: "text"}, first))
    else:
        raise pa.ArrowInvalid("read row by row")


def _csv(path: Path, kinds: Mapping[str, Kind]) -> Iterator[pa.RecordBatch]:
    import pyarrow.csv as pc

    with opened(path) as file, pc.open_csv(
        file,
        pc.ReadOptions(block_size=PIECE_BYTES, use_threads=False),
        pc.ParseOptions(newlines_in_values=True),
        pc.ConvertOptions(
            include_columns=list(kinds),
            column_types={column: _arrow_type(kind) for column, kind in kinds.items()},
        ),
    ) as batches:  # fmt: skip
        yield from batches


def _json_lines(path: Path, kinds: Mapping[str, Kind], first: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.json as pj

    whole = lambda column: isinstance(first[column], int) and kinds[column] == "name"  # noqa: E731
    schema = pa.schema([(c, pa.int64() if whole(c) else _arrow_type(kind)) for c, kind in kinds.items()])
    with opened(path) as file, pj.open_json(
        file,
        pj.ReadOptions(block_size=PIECE_BYTES, use_threads=False),
        pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    ) as batches:  # fmt: skip
        yield from batches


def _pieces_of_rows(path: Path, kinds: Mapping[str, Kind]) -> Iterator[dict[str, pa.Array]]:
    """As `_pieces`, of rows read one by one; ArtefactError names a row and a column."""
    import pyarrow as pa

    rows = numbered_rows(path)
    while piece := list(islice(rows, PIECE_ROWS)):
        yield {
            column: pa.array([_value(row, column, kind, path, number) for number, row in piece], _arrow_type(kind))
            for column, kind in kinds.items()
        }


def _value(row: Mapping[str, Any], column: str, kind: Kind, path: Path, number: int) -> Any:
    value = row.get(column)
    if kind not in ("number", "whole"):
        if value is None and kind == "name":
            raise ArtefactError(f"{path.name}, row {number}: no {column}")
        return None if value is None else str(value)
    if kind == "number":
        return finite(value, column, path, number)
    try:
        found = int(value)  # type: ignore[arg-type]  # of None it is a TypeError, which is caught
        whole = not isinstance(value, float) or found == value
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole or abs(found) >= 2**63:
        raise ArtefactError(f"{path.name}, row {number}: {column} is {value!r}, not a whole number")
    return found


def finite(value: Any, column: str, path: Path, number: int) -> float:
    """The number in a cell; ArtefactError names the row and the column of anything else."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArtefactError(f"{path.name}, row {number}: {column} is {value!r:.60}, not a number") from None
    if not math.isfinite(found):
        raise ArtefactError(f"{path.name}, row {number}: {column} is {found}; score again")
    return found
