"""Reading and writing of rows and JSON, digests, and joins by id.

`read_rows` reads the files of users in any format of `core.row_files`; `write_table` and `read_table` are for the
tables of a run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

from core.errors import ArtefactError
from core.row_files import Fault, numbered_rows, parsed

Row = TypeVar("Row")
"""A TypedDict of `core.data.rows`."""


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
    value = parsed(path.read_bytes())
    if isinstance(value, Fault):
        raise ArtefactError(f"{path}: {value}")
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, as `safetensors.safe_open` opens it for PyTorch.

    Raises:
        ArtefactError: no such file, or one whose header and length do not fit each other.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged, cut short or no safetensors file ({error})") from None


def read_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file, by name; ArtefactError as from `open_tensors`."""
    with open_tensors(path) as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118, it is no mapping


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file in one of the formats of `core.row_files`. The values of a CSV file are strings.

    Raises:
        ArtefactError: names the file, the line (.jsonl) or row, and what is wrong there; also for a file without rows.
    """
    rows = [row for _, row in numbered_rows(path)]
    if not rows:
        raise ArtefactError(f"{path}: holds no rows")
    return rows


def storable(value: Any) -> Any:
    """`value` with NaN and infinity as texts, as in rows of people's files that are only shown again."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: storable(one) for key, one in value.items()}
    return [storable(one) for one in value] if isinstance(value, list) else value


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def keep_until(file: Path, step: int) -> None:
    """Drop the rows of later steps from a JSONL file, and a last line that a kill cut short."""
    kept = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    if file.is_file():
        file.write_text("".join(kept))


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


def concatenate_tables(files: Sequence[Path], path: Path) -> None:
    """The rows of tables with the same columns, in one table, atomically. No row becomes a Python object.

    Raises:
        ArtefactError: no files; a file that is no Parquet, or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not files:
        raise ArtefactError(f"{path}: no rows to write")
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged_part(file, error) from None
        if tables[-1].column_names != tables[0].column_names:
            raise ArtefactError(f"{file} has other columns than {files[0]}: delete both, and they are made again")
    temporary = path.with_name(path.name + ".tmp")
    # A column that is null in all rows of one table has no type there, and gets that of the others.
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), temporary)
    os.replace(temporary, path)


def check_part(file: Path) -> None:
    """ArtefactError where a part of a table is no Parquet file, or was cut short; no rows are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged_part(file, error) from None


def _damaged_part(file: Path, error: Exception) -> ArtefactError:
    return ArtefactError(f"{file} is damaged ({error}): delete it, and it is made again")


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
