"""Preference files in every layout, with rows that are odd and files that are damaged: refused by name, or counted."""

import json
from collections import Counter

import pytest

from core.config import PreferenceSource
from core.data.sources import read_pairs
from core.data.tables import Malformed
from core.errors import ArtefactError, DataError
from core.files import write_jsonl, write_table
from core.row_files import numbered_rows
from tests.builders.inputs.fuzz import cases, damaged, lines, mutated, value, written
from tests.builders.processes import ROOT

ENTRIES = [json.loads(line) for line in (ROOT / "tests" / "builders" / "layouts.jsonl").read_text().splitlines()]


def read(file, layout="auto") -> tuple[str, list, Malformed]:
    malformed = Malformed()
    try:
        pairs = list(read_pairs(PreferenceSource(path=file, layout=layout), malformed))
    except (DataError, ArtefactError) as error:
        assert file.name in str(error)
        return "refused", [], malformed
    write_jsonl(file.with_name("rejected"), malformed.rows)  # as stage `preferences` does
    if pairs:
        write_table(file.with_name("table"), pairs)
    return "read", pairs, malformed


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["layout"])
def test_odd_rows_of_every_layout_are_counted(tmp_path, entry):
    file, outcomes = tmp_path / "pairs.jsonl", Counter()
    for rng in cases(entry["layout"], 8):
        rows = [*entry["rows"], *entry["rows"]]
        for _ in range(rng.randrange(1, 4)):
            rows = mutated(rng, rows) or entry["rows"]
        file.write_bytes(lines(rows))
        outcome, pairs, malformed = read(file)
        outcomes[outcome] += 1
        if outcome == "read":
            assert malformed.read + malformed.counts.total() == len(rows), (rows, malformed)
            assert all(isinstance(pair[side], str) and pair[side] for pair in pairs for side in ("chosen", "rejected"))
            assert len(malformed.rows) == malformed.counts.total()


def test_rows_of_any_kind(tmp_path):
    file = tmp_path / "pairs.json"
    for rng in cases("any rows", 40):
        file.write_text(json.dumps([value(rng) for _ in range(4)]))
        read(file)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_damaged_files_of_every_format(tmp_path, suffix):
    whole = written(
        tmp_path / f"whole{suffix}", [{"prompt": f"Why {k}?", "chosen": "So.", "rejected": "No."} for k in range(20)]
    )
    file = tmp_path / f"pairs{suffix}"
    for rng in cases(suffix, 25):
        file.write_bytes(damaged(rng, whole))
        outcome, pairs, malformed = read(file)
        if outcome == "read":
            faults = []
            rows = list(numbered_rows(file, lambda number, fault, to=faults: to.append(number)))
            assert malformed.read + malformed.counts.total() == len(rows) + len(faults)
