"""Evaluation sets in every layout, with odd rows: refused by name, or counted."""

from collections import Counter

import pytest

from core.errors import ArtefactError, DataError
from rm.evaluation.sets import read_set
from tests.builders.inputs.fuzz import cases, damaged, lines, mutated, value

CHAT = [{"role": "user", "content": "2 + 2?"}]
ROWS = {
    "rewardbench": {"id": 1, "subset": "math-prm", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "rewardbench2": {"id": "a", "subset": "Math", "prompt": "2 + 2?", "chosen": ["4"], "rejected": ["5", "6", "7"],
                     "num_correct": 1},
    "rm_bench": {"id": "a", "domain": "math", "prompt": "2 + 2?", "chosen": ["4", "4!", "**4**"],
                 "rejected": ["5", "5!", "**5**"]},
    "hhh": {"input": "2 + 2?", "targets": {"choices": ["4", "5"], "labels": [1, 0]}},
    "ppe": {"question_id": "a", "prompt": "2 + 2?", "response_1": "4", "response_2": "5", "winner": "model_a"},
    "mt_bench": {"question_id": 1, "model_a": "x", "model_b": "y", "winner": "model_a", "judge": "e", "turn": 1,
                 "conversation_a": [*CHAT, {"role": "assistant", "content": "4"}],
                 "conversation_b": [*CHAT, {"role": "assistant", "content": "5"}]},
    "pairs": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
}  # fmt: skip


def outcome(file, rows: int | None = None) -> str:
    try:
        found = read_set("set", file, max_malformed=1.0)
    except (DataError, ArtefactError) as error:
        assert str(error).strip()
        return "refused"
    if rows is not None:
        assert found.rows == rows
    return "read"


@pytest.mark.parametrize("layout", ROWS)
def test_odd_rows_of_every_layout_are_counted(tmp_path, layout):
    file, outcomes = tmp_path / "set.jsonl", Counter()
    file.write_bytes(lines([ROWS[layout]]))
    assert read_set("set", file).layout == layout
    for rng in cases(layout, 40):
        rows = [ROWS[layout]] * 2
        for _ in range(rng.randrange(1, 4)):
            rows = mutated(rng, rows)
        file.write_bytes(lines(rows))
        outcomes[outcome(file, len(rows))] += 1
    assert outcomes["refused"] or outcomes["read"]


def test_rows_of_any_kind_and_damaged_files(tmp_path):
    file = tmp_path / "set.jsonl"
    whole = lines([ROWS["rewardbench"]] * 5)
    for rng in cases("sets", 60):
        file.write_bytes(lines([value(rng) for _ in range(4)]) if rng.randrange(2) else damaged(rng, whole))
        outcome(file)
