"""Columns of files are what the rows hold, in every format, and faults name their row."""

import csv
import gzip
import json

import numpy as np
import pytest

from core.column_files import Names, pick, read_columns
from core.errors import ArtefactError
from core.files import digest, read_rows, write_jsonl, write_table

ROWS = [
    {"id": f"p{k % 3}", "number": k, "score": k / 7, "text": f'line {k},\n"quoted" é' * k, "more": [k], "empty": None}
    for k in range(40)
]
WANTED = {
    "id": ("id", "name"), "number": ("number", "whole"), "score": ("score", "number"), "text": ("text", "text"),
    "length": ("text", "length"), "digest": ("text", "digest"),
}  # fmt: skip


def write(path, rows):
    if path.name.endswith((".csv", ".csv.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        write_table(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_jsonl(path, rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.csv.gz", "a.parquet"])
def test_columns_are_those_of_the_rows(tmp_path, name):
    write(tmp_path / name, ROWS)
    found = read_columns(tmp_path / name, WANTED)
    assert isinstance(found["id"], Names)
    assert [found["id"].distinct[code] for code in found["id"].codes] == [row["id"] for row in ROWS]
    np.testing.assert_array_equal(found["number"], np.arange(40))
    np.testing.assert_allclose(found["score"], [row["score"] for row in ROWS])
    assert [text.as_py() for text in found["text"]] == [row["text"] for row in ROWS]
    assert found["length"].tolist() == [len(row["text"]) for row in ROWS]
    assert [f"{value:016x}" for value in found["digest"].tolist()] == [digest(row["text"]) for row in ROWS]
    assert pick(tmp_path / name, "text", [7, 3, 39]) == [ROWS[k]["text"] for k in (7, 3, 39)]


def test_ids_that_are_numbers_or_both_are_texts(tmp_path):
    for ids in ([1, 2, 1], [1, "b", 1]):
        write(tmp_path / "a.jsonl", [{"id": i} for i in ids])
        assert read_columns(tmp_path / "a.jsonl", {"id": ("id", "name")})["id"].distinct == [str(i) for i in ids[:2]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "row 3: score is nan"), ("x", "row 3: score is 'x', not a number")]
)
def test_a_fault_names_its_row(tmp_path, name, value, message):
    rows = [{"score": 0.5, "text": "a\nb"}, {"score": 1.5, "text": ""}, {"score": value, "text": ""}]
    if name != "a.csv":
        rows = [row | {"score": str(row["score"])} for row in rows] if value == "x" else rows
    if name == "a.jsonl":
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        write(tmp_path / name, rows)
    with pytest.raises(ArtefactError, match=message):
        read_columns(tmp_path / name, {"score": ("score", "number")})


def test_columns_that_are_missing_or_hold_other_things(tmp_path):
    write(tmp_path / "a.csv", [{"id": "a", "number": "1.5"}])
    with pytest.raises(ArtefactError, match="no column score; it has id, number"):
        read_columns(tmp_path / "a.csv", {"score": ("score", "number")})
    with pytest.raises(ArtefactError, match="row 1: number is '1.5', not a whole number"):
        read_columns(tmp_path / "a.csv", {"number": ("number", "whole")})
    write(tmp_path / "b.jsonl", [{"id": "a"}, {"id": None}])
    with pytest.raises(ArtefactError, match="id is missing in 1 rows|row 2: no id"):
        read_columns(tmp_path / "b.jsonl", {"id": ("id", "name")})


def test_texts_beyond_a_size_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("core.column_files.KEPT_BYTES", 1000)
    write(tmp_path / "a.csv", ROWS)
    found = read_columns(tmp_path / "a.csv", WANTED)
    assert found["text"] is None and found["length"].tolist() == [len(row["text"]) for row in ROWS]


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_an_array_of_json_is_read_in_pieces(tmp_path, monkeypatch, size):
    """Wherever a piece ends: within a string, an escape, a number or between elements."""
    monkeypatch.setattr("core.row_files.PIECE_CHARACTERS", size)
    rows = [{"a": 'b "quoted" \\ é', "n": [1, 2.5e-3, -12], "t": True, "x": {"y": None}}, {}, {"long": "z" * 300}] * 3
    for indent in (None, 4):
        (tmp_path / "a.json").write_text("\ufeff \n" + json.dumps(rows, indent=indent) + "\n ", encoding="utf-8")
        assert read_rows(tmp_path / "a.json") == rows


@pytest.mark.parametrize("size", [1, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a" 2}]', "not JSON"), ('[{"a": 1} {"a": 2}]', "Expecting ',' delimiter"),
        ('[{"a": 1}] more', "Extra data"), ('[{"a": 1}', "not JSON"), ('[{"a": "open', "not JSON"),
        ('[{"a": 1},]', "not JSON"), ("[", "not JSON"), ('[{"a": 1}, 123]', "row 2: not an object"),
        ("[]", "holds no rows"),
    ],
)  # fmt: skip
def test_a_broken_array_of_json_is_refused(tmp_path, monkeypatch, size, text, message):
    monkeypatch.setattr("core.row_files.PIECE_CHARACTERS", size)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtefactError, match=message):
        read_rows(tmp_path / "a.json")
