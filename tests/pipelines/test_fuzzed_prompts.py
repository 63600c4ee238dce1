"""Prompt files in every form, with rows that are odd and files that are damaged: refused by name, or counted."""

import json
from collections import Counter

import pytest

from core.config import Data, Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError, DataError
from core.files import write_jsonl, write_table
from core.row_files import numbered_rows
from pipelines.prompts import read_prompts
from tests.builders.inputs.fuzz import cases, damaged, lines, mutated, value, written

FORMS = [
    {"prompt": "Why?"}, {"prompt": [{"role": "user", "content": "Why?"}]},
    {"messages": [{"role": "user", "content": "Why?"}]},
    {"prompt": "Why?", "system": "Be brief.", "history": [["Hi", "Hello"]]},
    {"messages": [{"from": "human", "value": "Why?"}], "source": "x"},
    {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}], "id": 3},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return ChatTokenizer(Model(path=str(tokenizer_path)))


@pytest.fixture
def read(tokenizer, tmp_path):
    """Reads a file of prompts as the stage does, and writes what it writes; how it ended."""

    def outcome(file) -> str:
        try:
            found, _ = read_prompts(Data(prompts=file), tokenizer, seed=1)
        except (ArtefactError, DataError) as error:
            assert file.name in str(error)
            return "refused"
        faults = []
        rows = sum(1 for _ in numbered_rows(file, lambda *fault: faults.append(fault)))
        assert len(found.usable) + len(found.rejected) == rows + len(faults)
        write_jsonl(tmp_path / "rejected.jsonl", found.rejected)
        if found.usable:
            write_table(tmp_path / "prompts.parquet", found.usable)
        return "some" if found.usable else "none"

    return outcome


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_odd_prompts_are_counted(read, tmp_path, form):
    file, outcomes = tmp_path / "prompts.jsonl", Counter()
    for rng in cases(json.dumps(form), 30):
        row = form
        for _ in range(rng.randrange(1, 4)):
            row = mutated(rng, row)
        file.write_bytes(lines([row, form]))
        outcomes[read(file)] += 1
    assert outcomes["some"]


def test_rows_of_any_kind(read, tmp_path):
    for rng in cases("prompts", 60):
        (tmp_path / "prompts.json").write_text(json.dumps([value(rng) for _ in range(4)]))
        read(tmp_path / "prompts.json")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_damaged_files_of_every_format(read, tmp_path, suffix):
    whole = written(tmp_path / f"whole{suffix}", [{"prompt": f"Why {k}?", "system": "é"} for k in range(20)])
    for rng in cases(suffix, 30):
        (tmp_path / f"prompts{suffix}").write_bytes(damaged(rng, whole))
        read(tmp_path / f"prompts{suffix}")
