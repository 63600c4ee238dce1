"""Reading and writing of tables and JSON, digests, and joins by id."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.errors import ArtefactError


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
    """Write through a temporary file, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON Lines file; a bad line is an ArtefactError with file and line number."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ArtefactError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(path: Path, rows: list[dict]) -> None:
    """Rows to Parquet, atomically. All rows must have the keys of the first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise ArtefactError(f"{path}: no rows to write")
    if odd := [i for i, row in enumerate(rows) if row.keys() != rows[0].keys()]:
        raise ArtefactError(f"{path}: row {odd[0]} has other columns than row 0")
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    os.replace(temporary, path)


def read_table(path: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def join(left: list[dict], right: list[dict], on: tuple[str, ...] = ("prompt_id", "sample_id")) -> list[dict]:
    """Rows of `left` with the columns of `right`, matched by id; a missing or doubled id, or another text under one
    id, is an error with counts."""
    keyed = {tuple(row[k] for k in on): row for row in right}
    wanted = [tuple(row[k] for k in on) for row in left]
    missing = [key for key in wanted if key not in keyed]
    doubled = len(right) - len(keyed), len(wanted) - len(set(wanted))
    unused = len(keyed.keys() - set(wanted))
    if missing or any(doubled) or unused:
        raise ArtefactError(
            f"tables do not join on {', '.join(on)}: {len(missing)} rows without a partner (first {missing[:1]}), "
            f"{unused} partners unused, {doubled[1]} and {doubled[0]} doubled ids"
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
