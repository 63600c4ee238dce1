"""Published layouts: what each row is read as, or why it is refused, in files of every format."""

import csv
import json
from typing import get_args

import pytest

from core.config import PreferenceSource
from core.data.layouts.table import LAYOUTS
from core.data.layouts.text import parse_prompt, parse_rendering
from core.data.sources import read_pairs
from core.data.tables import Malformed
from tests.builders.layout_page import CASES, page, read
from tests.builders.pair_files import chat, write
from tests.builders.processes import ROOT

RENEW = "python -m tests.builders.layout_page > docs/data.md"


def pairs_of(path, **options):
    malformed = Malformed()
    return list(read_pairs(PreferenceSource(path=path, **options), malformed)), malformed


def outcome(pairs, malformed):
    """As `expect` of a case has it."""
    if pairs and not pairs[0]["tie"]:
        return {"chosen": pairs[0]["chosen"], "rejected": pairs[0]["rejected"]}
    return {"refuse": "tie" if pairs else ", ".join(malformed.counts)}


@pytest.mark.parametrize("case", CASES, ids=[case["layout"] for case in CASES])
def test_a_published_row_is_read_as_it_is_meant(case, tmp_path):
    assert outcome(*read(case)) == case["expect"]
    lines = write(tmp_path / "rows.jsonl", *case["rows"])
    (tmp_path / "rows.json").write_bytes(lines.read_bytes())
    for file in (lines, tmp_path / "rows.json"):
        pairs, malformed = pairs_of(file)
        assert outcome(pairs, malformed) == case["expect"]
        assert malformed.read + malformed.counts.total() == len(case["rows"])
        if "refuse" in case["expect"] and case["expect"]["refuse"] != "tie":
            assert malformed.rows[0]["where"] == f"{file.name} row 1"


def test_the_columns_of_parquet_are_read_as_those_of_json(tmp_path):
    """There, a key that one message has is null in all others, and an empty object cannot be written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, case in enumerate(CASES):
        rows = [{k: v for k, v in row.items() if v != {}} for row in case["rows"]]
        pq.write_table(pa.Table.from_pylist(rows), file := tmp_path / f"{number}.parquet")
        assert outcome(*pairs_of(file)) == case["expect"], case["layout"]


def test_every_layout_has_a_row_and_can_be_named():
    annotation = PreferenceSource.model_fields["layout"].annotation
    assert set(get_args(annotation)) == {"auto", *LAYOUTS}
    table = page().split("## Rows")[1]
    assert {name for name in LAYOUTS if f"| `{name}` |" in table} == set(LAYOUTS)


def test_the_page_is_current():
    current = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert current.splitlines() == page().splitlines(), f"docs/data.md is out of date; renew it: {RENEW}"
    assert f"`{RENEW}`" in current


SYSTEM, HISTORY = {"system": "You are a pirate."}, {"history": [["Hi", "Yes?"]]}
PIRATE = {"role": "system", "content": "You are a pirate."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "good", "rejected": "bad"},
        {"chosen": chat("Why?", "good"), "rejected": chat("Why?", "bad")},
        {"prompt": chat("Why?"), "chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]},
        {"instruction": "Why?", "output": ["good", "bad"]},
        {"question_id": "q", "prompt": "Why?", "response_1": "bad", "response_2": "good", "winner": "model_b"},
        {"prompt": "Why?", "chosen": ["good"], "rejected": ["bad"], "subset": "Math"},
    ],
)
def test_system_and_history_are_part_of_the_prompt_of_every_layout(tmp_path, row):
    (pair,), malformed = pairs_of(write(tmp_path / "a.jsonl", row | SYSTEM | HISTORY))
    assert pair["prompt"] == [PIRATE, *chat("Hi", "Yes?", "Why?")] and not malformed.counts
    assert (pair["chosen"], pair["rejected"]) == ("good", "bad") and not malformed.unread & {"system", "history"}
    for unusable in ({"tools": [{"name": "w"}]}, {"images": ["a.png"]}):
        assert set(pairs_of(write(tmp_path / "b.jsonl", row | unusable))[1].counts) == unusable.keys()


def test_a_conversation_with_another_system_turn_is_refused(tmp_path):
    row = {"chosen": [PIRATE, *chat("Hi", "good")], "rejected": [PIRATE, *chat("Hi", "bad")]}
    found, malformed = pairs_of(write(tmp_path / "a.jsonl", row | SYSTEM, row | {"system": "You are a parrot."}))
    assert [p["prompt"] for p in found] == [[PIRATE, *chat("Hi")]]
    assert malformed.counts == {"a system turn, and another one in the column system": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"system": "Be brief.", "system_prompt": "Rhyme."},
         "the columns system and system_prompt hold different system messages"),
        ({"chosen": 3}, "chosen is neither a text nor messages but int"),
        ({"rejected": 3}, "rejected is neither a text nor messages but int"),
        ({"chosen": [{"role": "assistant", "content": None, "reasoning_content": "So."}]}, "reasoning_content"),
    ],
)  # fmt: skip
def test_a_fault_names_its_columns(tmp_path, change, reason):
    row = {"prompt": "Hi", "chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]}
    assert pairs_of(write(tmp_path / "a.jsonl", row | change))[1].counts == {reason: 1}


def test_columns_that_nothing_was_read_from_are_named(tmp_path):
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "context": "As a poem.", "input": "Yo", "id": 7, "note": ""}
    assert pairs_of(write(tmp_path / "a.jsonl", row))[1].unread == {"context", "input", "id"}


def repeated(prompt, chosen="Pear.", rejected="Car."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_prompt_in_both_answers_is_left_out_of_them(tmp_path):
    rows = [
        repeated("Name a fruit.", "Name a fruit. Pear.", "Name a fruit.\n\nCar."),
        repeated("Name a fruit.", "Name a fruit. Pear.", "Car."),  # one side alone: it is part of the answer
        repeated("def f(x):", "def f(x):\n    return x", "def f(x):\n    return 1"),
        repeated(chat("Name a red fruit"), [*chat("", "Name a red fruit: Pear.")[1:]],
                 [*chat("", "Name a red fruit: Car.")[1:]]),
        repeated("Name a fruit", "Name a fruitless tree.", "Name a fruity wine."),
    ]  # fmt: skip
    found, malformed = pairs_of(write(tmp_path / "a.jsonl", *rows))
    assert [(p["chosen"], p["rejected"]) for p in found] == [
        ("Pear.", "Car."),
        ("Name a fruit. Pear.", "Car."),
        ("    return x", "    return 1"),
        (": Pear.", ": Car."),
        ("Name a fruitless tree.", "Name a fruity wine."),
    ]
    assert malformed.changed == {"prompt repeated in both answers left out of them": 3}


def test_a_greeting_is_not_taken_for_a_repeated_prompt(tmp_path):
    greeting = repeated("Hello!", "Hello! How can I help?", "Hello! What is it?")
    plain = [repeated(f"Question number {i}", "Yes.", "No.") for i in range(5)]
    (first, *_), malformed = pairs_of(write(tmp_path / "a.jsonl", greeting, *plain))
    assert first["chosen"] == "Hello! How can I help?" and not malformed.changed
    all_repeat = [repeated(p, f"{p} Yes.", f"{p} No.") for p in ("Hello!", "Why?", "Name a fruit.")]
    found, malformed = pairs_of(write(tmp_path / "b.jsonl", *all_repeat))
    assert {(p["chosen"], p["rejected"]) for p in found} == {("Yes.", "No.")} and malformed.changed.total() == 3


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
    ids=["chatml", "llama 3"],
)
def test_renderings_of_templates_are_taken_apart(text):
    assert parse_prompt(text) == [{"role": "system", "content": "Be brief."}, *chat("Why?")]


def test_a_marker_within_a_text_stays_text():
    assert parse_rendering("<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n") == chat("Why?")
    for text in (
        "<|im_start|>Hi",
        "What does <|im_start|>user\n mean?",
        "<|im_start|>user\nnot ended <|im_start|>assistant\nYes<|im_end|>",
        "<|im_start|>robot\nWhy?<|im_end|>",
        "He said\n\nHuman: Why?\n\nAssistant: So.",
    ):
        assert parse_prompt(text) == chat(text)


def test_kto_makes_pairs_where_a_prompt_has_both_labels(tmp_path):
    rows = [("Hi", "a", True), ("Hi", "b", False), ("Hi", "c", True), ("Yo", "d", True), ("Yo", "e", True)]
    file = write(tmp_path / "k.jsonl", *({"prompt": p, "completion": c, "label": y} for p, c, y in rows))
    found, malformed = pairs_of(file)
    assert [(p["chosen"], p["rejected"], p["margin"], p["tie"]) for p in found] == [
        ("a", "b", None, False),
        ("c", "b", None, False),
    ]
    reason = "one answer a row: pairs only where a prompt has both labels"
    assert malformed.counts == {reason: 2} and malformed.first[reason] == ["k.jsonl row 4", "k.jsonl row 5"]
    assert malformed.read == 3


def test_rows_of_many_answers_give_all_their_pairs(tmp_path):
    ranks = {"c": 3.0, "a": 1.0, "b": 2.0, "b2": 2.0}
    answers = [{"answer": text, "rank": rank} for text, rank in ranks.items()]
    nectar = {"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": answers}
    found, _ = pairs_of(write(tmp_path / "n.jsonl", nectar))
    assert [(p["chosen"], p["rejected"], p["tie"]) for p in found] == [
        ("a", "c", False), ("b", "c", False), ("b2", "c", False), ("a", "b", False), ("a", "b2", False),
        ("b", "b2", True),
    ]  # fmt: skip
    assert {p["margin"] for p in found} == {None}
    scored = [("a", 5.0), ("a", 2.0), ("b", 1.0)]
    completions = [{"response": text, "overall_score": score} for text, score in scored]
    twice = {"instruction": "Hi", "completions": completions}
    found, malformed = pairs_of(write(tmp_path / "u.jsonl", twice))
    assert [p["margin"] for p in found] == [4.0, 1.0] and not malformed.counts and malformed.read == 1
    assert malformed.changed == {"one pair of several left out: the two answers are equal": 1}


@pytest.mark.parametrize("equal", [False, True])
def test_ratings_of_a_pair_give_its_margin_and_ties(tmp_path, equal):
    texts = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
    names = [
        ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"),
        ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"),
    ]  # fmt: skip
    rows = [texts | {better: 4.5, worse: 4.5 if equal else 2.0} for better, worse in names]
    found, _ = pairs_of(write(tmp_path / "s.jsonl", *rows))
    assert [(p["margin"], p["tie"]) for p in found] == [(0.0, True) if equal else (2.5, False)] * len(names)


def test_csv_holds_texts_and_lists_of_messages(tmp_path):
    rows = [
        {"prompt": "When?", "chosen": "1984", "rejected": "None"},
        {"prompt": json.dumps(chat("Hi", "Yes?", "Why?")), "chosen": "good", "rejected": "bad"},
        {"prompt": str(chat("Hi")), "chosen": "good", "rejected": "bad"},
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (first, second), malformed = pairs_of(tmp_path / "a.csv")
    assert malformed.counts == {"messages written as text, but not as JSON": 1}
    assert (first["chosen"], first["rejected"]) == ("1984", "None") and second["prompt"] == chat("Hi", "Yes?", "Why?")


def test_chats_of_sharegpt_with_single_answers(tmp_path):
    say = lambda who, text: {"from": who, "value": text}  # noqa: E731
    row = {"conversations": [say("human", "Hi"), say("gpt", "Yes?"), say("human", "Why?")],
           "chosen": say("gpt", "good"), "rejected": say("gpt", "bad")}  # fmt: skip
    (pair,), _ = pairs_of(write(tmp_path / "s.jsonl", row))
    assert pair["prompt"] == chat("Hi", "Yes?", "Why?") and (pair["chosen"], pair["rejected"]) == ("good", "bad")


def test_a_prompt_that_is_not_the_beginning_of_the_chats_is_refused(tmp_path):
    row = {"prompt": chat("Why?"), "chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad")}
    assert pairs_of(write(tmp_path / "a.jsonl", row))[1].counts == {"the prompts differ": 1}
    spoken = {**row, "prompt": [PIRATE, *chat("Hi")]}
    assert pairs_of(write(tmp_path / "b.jsonl", spoken))[0][0]["prompt"] == [PIRATE, *chat("Hi")]


def test_rows_that_do_not_fit_a_named_layout_are_refused(tmp_path):
    dialogue = {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"}
    texts = {"prompt": "Why?", "chosen": "good", "rejected": "bad"}
    file = write(tmp_path / "a.jsonl", dialogue, texts, {"chosen": "good"})
    found, malformed = pairs_of(file, layout="hh")
    assert [p["row"] for p in found] == [1]
    reason = "does not fit the layout hh: chosen, rejected (texts with turns of both sides, no prompt)"
    assert malformed.counts == {reason: 1, "no column 'rejected'": 1}
    found, malformed = pairs_of(file)  # recognised, both are read
    assert [p["row"] for p in found] == [1, 2] and not malformed.unread


def test_a_text_among_lists_of_candidates_is_refused(tmp_path):
    row = {"prompt": "Hi", "chosen": ["good"], "rejected": ["bad"]}
    found, malformed = pairs_of(write(tmp_path / "a.jsonl", row, row | {"rejected": "bad"}))
    assert [p["row"] for p in found] == [1]
    assert malformed.counts == {"chosen and rejected are not both lists of texts": 1}
