"""Rows of every format are read alike, what cannot be read is named, and joins are by id."""

import bz2
import csv
import gzip
import json
import lzma

import pytest
import torch
from safetensors.torch import save_file

from core import row_files
from core.data.rows import ScoreRow
from core.errors import ArtefactError
from core.files import join, open_tensors, read_json, read_rows, read_table, read_tensors, write_table
from core.row_files import SUFFIXES, numbered_rows

ROWS = [{"prompt": "Why?", "answer": 'é, "so"\nand so'}, {"prompt": "How?", "answer": ""}]


def write(path, rows):
    """`rows` in the format of the file's suffix."""
    if path.suffix == ".parquet":
        write_table(path, rows)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    file = write(tmp_path / f"rows{suffix}", ROWS)
    assert read_rows(file) == ROWS and list(numbered_rows(file)) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_compressed_files_are_read_as_they_are(tmp_path, name, suffix, pack):
    packed = tmp_path / (name + suffix)
    packed.write_bytes(pack(write(tmp_path / name, ROWS).read_bytes()))
    assert list(numbered_rows(packed)) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_json_file_may_hold_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": 1}\n{oops\n\n{"a": 2}\n')
    faults = []
    rows = list(numbered_rows(tmp_path / "a.json", lambda *fault: faults.append(fault)))
    assert rows == [(1, {"a": 1}), (4, {"a": 2})] and faults == [(2, "not JSON")]


@pytest.mark.parametrize("content", [b'[{"a": 1}, {"a": 2}]\n\n', b'{"a": 1}\n\n{"a": 2}'], ids=["array", "lines"])
def test_no_text_of_a_json_file_is_parsed_twice(tmp_path, monkeypatch, content):
    (tmp_path / "a.json").write_bytes(content)
    parsed, texts = row_files.parsed, []
    monkeypatch.setattr(row_files, "parsed", lambda text: texts.append(text) or parsed(text))
    assert [row for _, row in numbered_rows(tmp_path / "a.json")] == [{"a": 1}, {"a": 2}]
    assert sum(map(len, texts)) <= len(content)


def test_two_columns_of_one_name_in_parquet_are_an_error(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(ArtefactError, match=r"a\.parquet: two columns are named 'a'"):
        read_rows(tmp_path / "a.parquet")


def test_a_json_file_may_hold_one_row_of_messages(tmp_path):
    row = {"messages": [{"role": "user", "content": "Why?"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert read_rows(tmp_path / "a.json") == [row]


def test_a_cell_holds_a_long_conversation_and_numbers_stay_text(tmp_path):
    rows = [{"prompt": "When?", "answer": "1984"}, {"prompt": "x" * 200_000, "answer": "None"}]
    assert read_rows(write(tmp_path / "a.csv", rows)) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, suffix):
    file = write(tmp_path / f"rows{suffix}", ROWS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_rows(file) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{oops\n', r"a\.jsonl, line 3: not JSON \(Expecting property name"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: not an object \(but list\)"),
        ("a.jsonl", b"null\n", r"a\.jsonl, line 1: not an object \(but NoneType\)"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: holds no rows"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json, row 2: not an object \(but int\)"),
        ("a.json", b'{\n  "a": 1\n}', r"a\.json: holds a dict; a \.json file must hold an array"),
        ("a.json", b'[{"a": 1},', r"a\.json: not JSON"),
        ("a.json", b'["\xff"]', r"a\.json: not UTF-8"),
        ("a.json", b"", r"a\.json: not JSON"),
        ("a.json", b'{\n  "data": [{"a": 1}]\n}', r"a\.json: holds a dict; .* make the array in 'data' the whole file"),
        ("a.json", b'{"data": [{"a": 1}]}', r"a\.json: holds a dict; .* make the array in 'data' the whole file"),
        ("a.csv", b"a,b,c,b\n1,2,3,4\n", r"a\.csv: two columns are named 'b': rename or remove one"),
        ("a.csv", b"a;b\n1;2\n", r"a\.csv: the header is one column, 'a;b': separate columns by commas, not ';'"),
        ("a.csv", b"a,b\n1,2\n3,\xff\n", r"a\.csv, line 3: not UTF-8"),
        ("a.csv", b"a,b\n1,2\n3,4,5\n", r"a\.csv, row 2: more cells than the header has"),
        ("a.jsonl.gz", b"plain text", r"a\.jsonl\.gz: cannot be unpacked \(Not a gzipped file"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz: give a"),
        ("a.csv", b"a,b\n", r"a\.csv: holds no rows"),
        ("a.csv", b"", r"a\.csv: holds no rows"),
        ("a.parquet", b"", r"a\.parquet: not Parquet, or cut short"),
        ("a.parquet", b"PAR1 and some text", r"a\.parquet: not Parquet, or cut short"),
        ("a.txt", b"text", r"a\.txt: give a \.jsonl, \.json, \.csv or \.parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        read_rows(tmp_path / name)


def test_a_truncated_or_damaged_parquet_file_is_named(tmp_path):
    whole = write(tmp_path / "whole.parquet", [{"a": f"row {i}"} for i in range(5000)]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match=r"cut\.parquet: not Parquet, or cut short"):
        read_table(tmp_path / "cut.parquet")
    (tmp_path / "damaged.parquet").write_bytes(whole[:100] + bytes(1000) + whole[1100:])
    with pytest.raises(ArtefactError, match=r"damaged\.parquet.*: not Parquet, or cut short"):
        read_table(tmp_path / "damaged.parquet")


def test_tables_are_checked_against_their_schema(tmp_path):
    file, row = tmp_path / "gold.parquet", {"prompt_id": "p", "sample_id": 0, "score": 1.5}
    write_table(file, [row], ScoreRow)
    assert read_table(file, ScoreRow) == [row]
    write_table(file, [row | {"text_sha": "ab"}], ScoreRow)  # a column that may be absent
    with pytest.raises(
        ArtefactError, match=r"no table of ScoreRow: column sample_id is missing, column sample is extra"
    ):
        write_table(file, [{"prompt_id": "p", "sample": 0, "score": 1.5}], ScoreRow)
    with pytest.raises(ArtefactError, match="row 1 has other columns than row 0"):
        write_table(file, [row, row | {"text_sha": "ab"}], ScoreRow)
    write_table(file, [{"prompt_id": "p"}])
    with pytest.raises(
        ArtefactError, match=r"gold\.parquet is no table of ScoreRow: column sample_id is missing, column score"
    ):
        read_table(file, ScoreRow)


def test_a_folder_or_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtefactError, match=r"is a folder: give a \.jsonl"):
        read_rows(tmp_path)
    for read in (read_rows, read_json):
        with pytest.raises(ArtefactError, match=r"no file .*missing\.json"):
            read(tmp_path / "missing.json")


def test_faults_of_single_rows_can_be_collected(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\xff\n{oops\n\n7\n{"a": 2}\n')
    faults = []
    rows = list(numbered_rows(tmp_path / "a.jsonl", lambda *fault: faults.append(fault)))
    assert rows == [(1, {"a": 1}), (6, {"a": 2})]
    assert faults == [(2, "not UTF-8"), (3, "not JSON"), (5, "not an object")]


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "facts.json").write_text('{"mean": ')
    with pytest.raises(ArtefactError, match=r"facts\.json: not JSON"):
        read_json(tmp_path / "facts.json")


def test_join_is_by_id_and_complete():
    left = [{"prompt_id": "p", "sample_id": i, "x": i} for i in range(3)]
    right = [{"prompt_id": "p", "sample_id": i, "score": 10 * i} for i in (2, 0, 1)]
    assert [row["score"] for row in join(left, right)] == [0, 10, 20]
    for wrong in (right[:2], [*right, right[0]], [*right, {"prompt_id": "q", "sample_id": 0, "score": 1}]):
        with pytest.raises(ArtefactError, match="do not join"):
            join(left, wrong)


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_tensors_that_were_cut_short_are_named(tmp_path, size):
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(6.0)}, file)
    assert read_tensors(file)["weight"].tolist() == list(range(6))
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ArtefactError, match="model.safetensors is damaged, cut short or no safetensors file"):
        read_tensors(file)
    file.unlink()
    with pytest.raises(ArtefactError, match="model.safetensors"), open_tensors(file):
        pass


@pytest.mark.parametrize(("name", "unit"), [("a.jsonl", "line"), ("a.json", "row")])
def test_half_a_pair_of_surrogates_is_no_text(tmp_path, name, unit):
    """Python reads it, and nothing can write, encode or tokenize what it makes of it."""
    good, bad = {"prompt": "\U0001f600 caf\u00e9"}, {"prompt": ["x", {"y": "\ud83d"}]}
    text = json.dumps([good, bad]) if unit == "row" else f"{json.dumps(good)}\n{json.dumps(bad)}\n"
    (tmp_path / name).write_text(text)
    assert "\\ud83d\\ude00" in text
    faults = []
    assert list(numbered_rows(tmp_path / name, lambda *fault: faults.append(fault))) == [(1, good)]
    assert faults == [(2, "not valid Unicode")]
    with pytest.raises(ArtefactError, match=f"{name}, {unit} 2: not valid Unicode"):
        read_rows(tmp_path / name)
