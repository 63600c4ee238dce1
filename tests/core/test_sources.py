"""Preference data of other people: layouts, malformed rows, weights."""

import json

import pytest

from core.config import PreferenceSource
from core.data.labels import repeated
from core.data.layouts.readers import SUMMARISE
from core.data.sources import read_pairs
from core.data.splits import prompt_id
from core.data.tables import Malformed
from core.errors import DataError
from core.files import write_table
from tests.builders.pair_files import chat, many, unified, write


def pairs_of(path, **options):
    malformed = Malformed()
    return list(read_pairs(PreferenceSource(path=path, **options), malformed)), malformed


def essentials(pair):
    return [m["content"] for m in pair["prompt"]], pair["chosen"], pair["rejected"], pair["margin"], pair["tie"]


def test_unified_takes_the_higher_rating_and_marks_ties(tmp_path):
    rows = [unified(1, 0), unified(2.5, 3), unified(1, 1), unified(1, 0, source="openai/summarize_from_feedback")]
    found, malformed = pairs_of(write(tmp_path / "u.jsonl", *rows))
    assert not malformed.counts
    assert essentials(found[0]) == (["Hi"], "good", "bad", 1.0, False)
    assert essentials(found[1]) == (["Hi"], "bad", "good", 0.5, False)
    assert found[2]["tie"] and [p["row"] for p in found] == [1, 2, 3, 4]
    assert essentials(found[3])[0] == [SUMMARISE + "Hi"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
        {"prompt": chat("Hi"), "chosen": chat("Hi", "good")[1:], "rejected": chat("Hi", "bad")[1:]},
        {"chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad")},
        {"prompt": "Hi", "chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad"), "messages": chat("Hi", "good")},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"},
    ],
    ids=["texts", "explicit prompt", "implicit prompt", "ultrafeedback", "hh"],
)
def test_one_pair_in_every_published_shape(tmp_path, row):
    (pair,), malformed = pairs_of(write(tmp_path / "set.jsonl", row))
    assert essentials(pair) == (["Hi"], "good", "bad", None, False) and not malformed.counts
    table = tmp_path / "set.parquet"
    write_table(table, [row])
    assert [essentials(p) for p in pairs_of(table)[0]] == [essentials(pair)]


def test_hh_keeps_all_turns(tmp_path):
    said = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nso?\n\nAssistant: "
    (pair,), _ = pairs_of(write(tmp_path / "hh.jsonl", {"chosen": said + "good", "rejected": said + "bad"}))
    assert essentials(pair)[:3] == (["Hi", "Yes?", "Why\n\nso?"], "good", "bad")


def test_ratings_make_a_pair_of_each_two_responses(tmp_path):
    rated = [("Hi", "a", 1), ("Yo", "z", 4), ("Hi", "b", 3), ("Hi", "c", 3)]
    rows = [{"prompt": p, "response": r, "helpfulness": s} for p, r, s in rated]
    found, _ = pairs_of(write(tmp_path / "steer.jsonl", *rows))
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in found] == [("b", "a", 2), ("c", "a", 2), ("b", "c", 0)]
    assert [p["tie"] for p in found] == [False, False, True]


@pytest.mark.parametrize(
    "prompt",
    [
        "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nWhy?",
        "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:",
    ],
    ids=["helpsteer2", "hh"],
)
def test_prompts_of_several_turns_in_one_text(tmp_path, prompt):
    (pair,), _ = pairs_of(write(tmp_path / "t.jsonl", {"prompt": prompt, "chosen": "good", "rejected": "bad"}))
    assert pair["prompt"] == chat("Hi", "Yes?", "Why?")


def test_text_that_no_encoding_holds_is_one_bad_row(tmp_path):
    rows = [unified(prompt="cut \ud83d"), unified(first="cut \ud83d"), unified(a=10**400), unified()]
    found, malformed = pairs_of(write(tmp_path / "u.jsonl", *rows))
    assert [p["row"] for p in found] == [4] and malformed.counts["not valid Unicode"] == 2


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = write(tmp_path / "u.jsonl", unified())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(pairs_of(path)[0]) == 1


def test_the_split_of_a_folder_is_read_alone(tmp_path):
    write(tmp_path / "train-0.jsonl", unified(prompt="t"))
    write(tmp_path / "test-0.jsonl", unified(prompt="held out"))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [essentials(p)[0] for p in pairs_of(tmp_path)[0]] == [["t"]]
    assert [essentials(p)[0] for p in pairs_of(tmp_path, split="test")[0]] == [["held out"]]


def test_scores_of_a_pair_become_its_margin(tmp_path):
    row = {"prompt": "Hi", "chosen": "good", "rejected": "bad", "score_chosen": 8.0, "score_rejected": 6.5}
    found, malformed = pairs_of(write(tmp_path / "s.jsonl", row, row | {"score_chosen": 6.0}))
    assert [p["margin"] for p in found] == [1.5]
    assert malformed.counts == {"the rating of rejected exceeds that of chosen": 1}


def test_bad_rows_are_counted_by_reason_with_their_numbers(tmp_path):
    good = unified()
    bad = [
        unified(first="same", second="same"),
        unified(first=" "),
        unified(a=float("nan")),
        unified() | {"conv_B": chat("Other", "bad")},
        unified() | {"conv_A": [*chat("Hi"), *chat("Hi", "x")], "conv_B": [*chat("Hi"), *chat("Hi", "y")]},
        {k: v for k, v in unified().items() if k != "conv_B_rating"},
        ["no object"],
    ]
    path = write(tmp_path / "u.jsonl", good, *bad)
    path.write_bytes(path.read_bytes() + b"\n\xff\xfe\n{broken\n" + json.dumps(unified(prompt="Last")).encode())
    found, malformed = pairs_of(path)
    assert [p["row"] for p in found] == [1, 11]
    assert malformed.counts == {
        "the two answers are equal": 1,
        "a response is empty": 1,
        "a rating is not a finite number": 1,
        "the prompts differ": 1,
        "roles must alternate user, assistant, ... and end with user, not ['user', 'user']": 1,
        "no column 'conv_B_rating'": 1,
        "not an object": 1,
        "not UTF-8": 1,
        "not JSON": 1,
    }
    assert malformed.first["not UTF-8"] == ["u.jsonl row 9"]
    assert {"reason": "a response is empty", "where": "u.jsonl row 3"} in malformed.rows


def test_unknown_columns_and_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="columns text are of no known layout"):
        pairs_of(write(tmp_path / "x.jsonl", {"text": "?"}))
    for row, hint in (
        ({"text": "?"}, r"layouts are unified, .*docs/data\.md"),
        ({"Prompt": "Hi", "Chosen": "a", "rejected": "b"},
         "rename Prompt to prompt, Chosen to chosen for the layout trl"),
        ({"prompt": "Hi", "response_1": "a", "response_2": "b", "best": 1},
         r"nearest are ppe \(prompt, response_1, response_2, winner: lacks winner\); helpsteer "),
        ({"instruction": "Hi", "output": "a"}, r"nearest are outputs \(instruction, output: output a list\)"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=hint) as error:
            pairs_of(write(tmp_path / "x.jsonl", row))
        assert len(str(error.value)) < 450
    with pytest.raises(DataError, match="nowhere/at/all: neither"):
        pairs_of(tmp_path / "nowhere/at/all")


def test_weights_repeat_training_pairs():
    rows = [{"pair_id": prompt_id(chat(f"q {i}")), "weight": 2.5} for i in range(400)]
    counts = {row["pair_id"]: 0 for row in rows}
    for row in repeated(rows):
        counts[row["pair_id"]] += 1
    assert set(counts.values()) == {2, 3}
    assert sum(counts.values()) / len(rows) == pytest.approx(2.5, abs=0.1)


def test_one_odd_row_does_not_decide_a_files_layout(tmp_path):
    found, malformed = pairs_of(write(tmp_path / "u.jsonl", {"note": "made by hand"}, *many(3)))
    assert len(found) == 3 and found[0]["row"] == 2
    assert malformed.lines() == ["1 x columns of no known layout (u.jsonl row 1)"]


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if options["split"] != "train":
            raise ValueError("Unknown split")
        return datasets.Dataset.from_list(many(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, _ = pairs_of("llm-blender/Unified-Feedback", subset="all", revision="abc")
    assert [p["row"] for p in found] == [1, 2, 3] and found[0]["source"] == "x/y"
    assert calls == [(("llm-blender/Unified-Feedback", "all"), {"split": "train", "revision": "abc"})]
    with pytest.raises(DataError, match="the hub gives no split 'test' of it: Unknown split"):
        pairs_of("llm-blender/Unified-Feedback", split="test")


@pytest.mark.parametrize(
    ("row", "margin"),
    [
        ({"chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad"), "prompt": "Hi", "chosen_score": 4.0,
          "rejected_score": 1.5}, 2.5),  # preference_700K
        ({"chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad"), "source": "magpie"}, None),  # Skywork-80K
        ({"prompt": "Hi", "prompt_id": "1", "chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad"),
          "messages": chat("Hi", "good"), "score_chosen": 8.0, "score_rejected": 8.0}, 0.0),  # UltraFeedback, a tie
    ],
)  # fmt: skip
def test_rows_as_they_are_published(tmp_path, row, margin):
    (found,), malformed = pairs_of(write(tmp_path / "p.jsonl", row))
    assert essentials(found) == (["Hi"], "good", "bad", margin, margin == 0.0) and not malformed.counts
