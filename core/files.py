"""Reading and writing of rows and JSON, digests, and joins by id.

`read_rows` reads the files of users in any of SUFFIXES; `write_table` and `read_table` are for the tables of a run.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

from core.errors import ArtefactError

Row = TypeVar("Row")
"""A TypedDict of `core.data.rows`."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Formats of rows: JSON Lines, a JSON array of objects, CSV with a header, Parquet."""
BATCH_ROWS = 1024
"""Rows of a Parquet file that are in memory at a time."""


class _Fault(NamedTuple):
    """What is wrong with a row: the kind of fault, and details of this one."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_digest(path: Path) -> str:
    """Digest of a file, or of every file below a folder (names and contents)."""
    if path.is_file():
        return file_digest(path)[:16]
    return digest({str(p.relative_to(path)): file_digest(p) for p in sorted(path.rglob("*")) if p.is_file()})


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary file, so that no reader sees a half-written one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ArtefactError: no such file, or one that is not JSON in UTF-8.
    """
    if not path.is_file():
        raise ArtefactError(f"no file {path}")
    value = _parsed(path.read_bytes())
    if isinstance(value, _Fault):
        raise ArtefactError(f"{path}: {value}")
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file in one of SUFFIXES. The values of a CSV file are strings.

    Raises:
        ArtefactError: names the file, the line (.jsonl) or row, and what is wrong there; also for a file without rows.
    """
    rows = [row for _, row in numbered_rows(path)]
    if not rows:
        raise ArtefactError(f"{path}: holds no rows")
    return rows


def numbered_rows(
    path: Path, on_fault: Callable[[int, str], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file in one of SUFFIXES, read as they are needed; in .jsonl the number of the line.

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
    readers = dict(zip(SUFFIXES, (_json_lines, _json_array, _csv_rows, _parquet_rows), strict=True))
    if path.suffix not in readers:
        raise ArtefactError(f"{path}: give a {_either(SUFFIXES)} file")
    unit = "line" if path.suffix == ".jsonl" else "row"
    for number, value in readers[path.suffix](path):
        if isinstance(value, dict):
            yield number, value
            continue
        fault = value if isinstance(value, _Fault) else _Fault("not an object", f"but {type(value).__name__}")
        if on_fault is None:
            raise ArtefactError(f"{path}, {unit} {number}: {fault}")
        on_fault(number, fault.kind)


def _either(suffixes: tuple[str, ...]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _parsed(data: bytes) -> Any:
    """A JSON value, or the fault of its text."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _Fault("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return _Fault("not JSON", str(error))


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line)


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ArtefactError(f"{path}: holds a {type(rows).__name__}; a .json file must hold an array of rows")
    yield from enumerate(rows, start=1)


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        rows, number = csv.DictReader(_decoded(file, path)), 0
        try:
            for number, row in enumerate(rows, start=1):
                yield number, _Fault("more cells than the header has") if None in row else row
        except csv.Error as error:
            raise ArtefactError(f"{path}, row {number + 1}: not CSV ({error})") from None


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
        rows = (row for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{path}, after row {number}" if number else str(path)
        raise ArtefactError(f"{where}: not Parquet, or cut short ({error})") from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], schema: type | None = None) -> None:
    """Rows to Parquet, atomically.

    Args:
        schema: the TypedDict of `core.data.rows` whose columns the rows must have.

    Raises:
        ArtefactError: no rows; rows of different columns; a column that the schema lacks, or one that it has.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise ArtefactError(f"{path}: no rows to write")
    if schema is not None:
        _check_columns(path, rows[0], schema, exact=True)
    if odd := [i for i, row in enumerate(rows) if row.keys() != rows[0].keys()]:
        raise ArtefactError(f"{path}: row {odd[0]} has other columns than row 0")
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
    os.replace(temporary, path)


@overload
def read_table(path: Path) -> list[dict[str, Any]]: ...


@overload
def read_table(path: Path, schema: type[Row]) -> list[Row]: ...


def read_table(path: Path, schema: type | None = None) -> list[Any]:
    """Rows of a table of a run; ArtefactError also for a column of the schema that it lacks."""
    rows = read_rows(path)
    if schema is not None:
        _check_columns(path, rows[0], schema, exact=False)
    return rows


def _check_columns(path: Path, row: Mapping[str, Any], schema: Any, *, exact: bool) -> None:
    known = schema.__required_keys__ | schema.__optional_keys__
    faults = [f"column {name} is missing" for name in sorted(schema.__required_keys__ - row.keys())]
    if exact:
        faults += [f"column {name} is extra" for name in sorted(row.keys() - known)]
    if faults:
        raise ArtefactError(f"{path} is no table of {schema.__name__}: {', '.join(faults)}")


def join(
    left: Sequence[Mapping[str, Any]],
    right: Sequence[Mapping[str, Any]],
    on: tuple[str, ...] = ("prompt_id", "sample_id"),
) -> list[dict[str, Any]]:
    """Rows of `left` with the columns of `right`, matched by id.

    Raises:
        ArtefactError: a missing or duplicate id, or one id with different texts in the two tables; with counts.
    """
    keyed = {tuple(row[k] for k in on): row for row in right}
    wanted = [tuple(row[k] for k in on) for row in left]
    missing = [key for key in wanted if key not in keyed]
    duplicates = len(right) - len(keyed), len(wanted) - len(set(wanted))
    unused = len(keyed.keys() - set(wanted))
    if missing or any(duplicates) or unused:
        raise ArtefactError(
            f"tables do not join on {', '.join(on)}: {len(missing)} rows without a partner (first {missing[:1]}), "
            f"{unused} partners unused, {duplicates[1]} and {duplicates[0]} duplicate ids"
        )
    joined = [{**row, **keyed[key]} for row, key in zip(left, wanted, strict=True)]
    for column in ("text_sha", "response"):
        if left and column in left[0] and column in right[0]:
            other = [key for row, new, key in zip(left, joined, wanted, strict=True) if row[column] != new[column]]
            if other:
                raise ArtefactError(f"{len(other)} ids name different texts in the two tables (first {other[0]})")
    return joined


def count_rows(path: Path) -> int | None:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows
    if path.suffix in (".jsonl", ".csv"):
        with path.open("rb") as file:
            return sum(1 for _ in file) - (path.suffix == ".csv")
    return None
