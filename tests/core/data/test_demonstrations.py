"""Which prompt and answer a row of demonstrations is read as."""

import json

import pytest

from core.config import Sft
from core.data.demonstrations import read_demonstrations
from core.data.tables import Malformed
from core.errors import DataError
from tests.builders.pair_files import chat, write
from tests.builders.processes import ROOT

ROWS = {
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello."}, "user: Hi", "Hello."),
    "messages on both sides": ({"prompt": chat("Hi"), "completion": [{"role": "assistant", "content": "Hello."}]},
                               "user: Hi", "Hello."),
    "instruction, input, output": ({"instruction": "Add.", "input": "1 2", "output": "3"}, "user: Add.\n1 2", "3"),
    "question and answer, system": ({"question": "Hi", "answer": "Hello.", "system": "Be kind."},
                                    "system: Be kind.|user: Hi", "Hello."),
    "messages": ({"messages": chat("Hi", "Hello.", "Bye", "Farewell.")},
                 "user: Hi|assistant: Hello.|user: Bye", "Farewell."),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
                 "user: Hi", "Hello."),
    "prompt beside messages": ({"prompt": "Hi", "prompt_id": "7", "messages": chat("Hi", "Hello.")}, "user: Hi",
                               "Hello."),
    "a pair": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}, "user: Hi", "Hello."),
    "a rated pair": ({"conv_A": chat("Hi", "Go away."), "conv_B": chat("Hi", "Hello."), "conv_A_rating": 0,
                      "conv_B_rating": 1, "source": "x"}, "user: Hi", "Hello."),
}  # fmt: skip


def read(path) -> tuple[list, Malformed]:
    malformed = Malformed()
    return list(read_demonstrations(Sft(data=path), malformed)), malformed


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_each_kind(tmp_path, kind):
    row, prompt, response = ROWS[kind]
    (found,), malformed = read(write(tmp_path / "a.jsonl", row))
    assert "|".join(f"{m['role']}: {m['content']}" for m in found["prompt"]) == prompt
    assert (found["response"], found["row"], malformed.read) == (response, 1, 1)


def test_what_cannot_be_used_is_counted_and_does_not_stop_the_rest(tmp_path):
    good = {"prompt": "Hi", "completion": "Hello."}
    rows = [good, {"prompt": "Hi"}, {"prompt": "", "completion": "x"}, {"prompt": "Hi", "completion": "  "},
            {"messages": chat("Hi")}, good | {"tools": ["a"]}, good, {"prompt": 7, "completion": 8}]  # fmt: skip
    found, malformed = read(write(tmp_path / "a.jsonl", *rows))
    assert [d["row"] for d in found] == [1, 7]
    assert malformed.counts.total() == 6 and [row["where"] for row in malformed.rows][0] == "a.jsonl row 2"
    ties = {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1}
    found, malformed = read(write(tmp_path / "b.jsonl", ties))
    assert not found and malformed.changed["tie left out"] == 1


def test_a_file_of_something_else_is_refused_by_its_columns(tmp_path):
    with pytest.raises(DataError, match="a.jsonl row 1: columns text, url are no demonstration: give a prompt"):
        read(write(tmp_path / "a.jsonl", {"text": "x", "url": "y"}))


def test_the_shipped_demonstrations_are_one_sentence_each_and_none_of_the_prompts():
    rows = [json.loads(line) for line in (ROOT / "examples" / "demonstrations.jsonl").read_text().splitlines()]
    prompts = {json.loads(line)["prompt"] for line in (ROOT / "data" / "prompts.jsonl").read_text().splitlines()}
    assert len(rows) == len({row["prompt"] for row in rows}) == 72
    assert not {row["prompt"] for row in rows} & prompts
    assert all(row["completion"].endswith(".") and row["completion"].count(". ") == 0 for row in rows)
