"""Imported pairs: strides, splits, decontamination, copies, and how many malformed rows are allowed."""

import json
from collections import Counter

import pytest

from core.config import Config
from core.data.rows import PromptRow
from core.data.splits import normalised, prompt_id
from core.errors import ArtefactError
from core.files import write_table
from pipelines.import_pairs import import_pairs
from tests.builders.pair_files import chat, many, unified, write


def settings(tmp_path, **preferences):
    messages = [{"role": "user", "content": "What is asked in the evaluation?"}]
    row = {"prompt_id": prompt_id(messages), "prompt": messages, "num_tokens": 9, "split": "eval", "order": 0.0}
    write_table(tmp_path / "prompts.parquet", [row], PromptRow)
    return Config(preferences=preferences)


def imported(cfg, prompts, out=None):
    return import_pairs(cfg.preferences, cfg.data, prompts=prompts, seed=cfg.run.seed, out=out)


def test_the_stride_counts_pairs_without_ties(tmp_path):
    rows = [row for i in range(10) for row in (unified(1, 1, prompt=f"tie {i}"), unified(prompt=f"clear {i}"))]
    path = write(tmp_path / "u.jsonl", *rows)
    cfg = settings(tmp_path, sources={"u": {"path": path, "stride": 4}})
    splits, dropped, _ = imported(cfg, tmp_path)
    kept = sorted(r["prompt"][0]["content"] for rows in splits.values() for r in rows)
    assert kept == ["clear 0", "clear 4", "clear 8"] and dropped == {"u": {"tie": 10}}


def test_the_stride_takes_the_rows_that_the_grm_authors_take(tmp_path):
    """Their code: `ds.filter(conv_A_rating != conv_B_rating)`, then `ds.select(range(0, len(ds), 20))`. Rows that
    nothing can be learnt from are among those that are counted."""
    rows = [unified(i % 3, (i * i) % 4 % 3, prompt=f"row {i}") for i in range(200)]
    for i in range(0, 200, 7):
        rows[i] |= {"conv_A": chat(f"row {i}", "")}
    for i in range(0, 200, 11):
        rows[i] |= {"conv_A": rows[i]["conv_B"]}
    rows[40] |= {"conv_A": chat("another prompt", "x")}
    untied = [row for row in rows if row["conv_A_rating"] != row["conv_B_rating"]]
    theirs = {row["conv_A"][0]["content"] for row in untied[::20]}
    path = write(tmp_path / "u.jsonl", *rows)
    cfg = settings(tmp_path, sources={"u": {"path": path, "stride": 20}}, max_rejected_share=1.0)
    splits, dropped, malformed = imported(cfg, tmp_path)
    ours = {r["prompt"][0]["content"] for rows in splits.values() for r in rows}
    unusable = {row["conv_A"][0]["content"] for row in rows if not row["conv_A"][1]["content"]}
    unusable |= {row["conv_B"][0]["content"] for row in rows if row["conv_A"] == row["conv_B"]}
    assert ours == theirs - unusable and len(ours) < len(theirs)
    assert malformed.read + malformed.counts.total() == 200 and dropped["u"]["tie"] > 0


def test_the_stride_counts_a_row_of_several_pairs_once(tmp_path):
    scores = [("a", 3.0), ("b", 2.0), ("c", 2.0)]
    completions = [{"response": text, "overall_score": score} for text, score in scores]
    path = write(tmp_path / "u.jsonl", *({"instruction": f"row {i}", "completions": completions} for i in range(10)))
    cfg = settings(tmp_path, sources={"u": {"path": path, "stride": 4}})
    splits, dropped, _ = imported(cfg, tmp_path)
    kept = Counter(r["prompt"][0]["content"] for rows in splits.values() for r in rows)
    assert kept == {"row 0": 2, "row 4": 2, "row 8": 2} and dropped == {"u": {"tie": 10}}


def test_the_stride_goes_on_over_files(tmp_path):
    (tmp_path / "set").mkdir()
    for number in (0, 1):
        rows = [unified(prompt=f"row {10 * number + i}") for i in range(10)]
        write(tmp_path / "set" / f"train-0000{number}-of-00002.jsonl", *rows)
    splits, _, _ = imported(settings(tmp_path, sources={"u": {"path": tmp_path / "set", "stride": 4}}), tmp_path)
    kept = {r["prompt"][0]["content"] for rows in splits.values() for r in rows}
    assert kept == {f"row {i}" for i in range(0, 20, 4)}


def test_what_was_done_to_rows_is_counted(tmp_path):
    rows = [{"prompt": f"Question {i} is this.", "chosen": f"Question {i} is this. Yes.", "rejected": "No.", "id": i}
            for i in range(10)]  # fmt: skip
    rows[0]["rejected"] = "Question 0 is this. No."
    path = write(tmp_path / "r.jsonl", *rows, {**rows[1], "split": "validation"}, {**rows[1], "images": ["a.png"]})
    cfg = settings(tmp_path, sources={"r": {"path": path}}, max_rejected_share=0.1)
    splits, _, malformed = imported(cfg, tmp_path, tmp_path)
    chosen = {r["chosen"] for rows in splits.values() for r in rows}
    assert "Yes." in chosen and "Question 1 is this. Yes." in chosen and len(chosen) == 10
    assert malformed.changed == {
        "prompt repeated in both answers left out of them": 1,
        "row of split 'validation' not read": 1,
    }
    assert malformed.counts == {"images": 1} and malformed.unread == {"id"}
    assert json.loads((tmp_path / "rejected.jsonl").read_text()) == {"reason": "images", "where": "r.jsonl row 12"}


def test_a_source_of_other_splits_only_says_so(tmp_path):
    path = write(tmp_path / "v.jsonl", *(row | {"split": "validation"} for row in many(3)))
    with pytest.raises(ArtefactError, match=r"sources\.v: no pair; 3 x row of split 'validation' not read"):
        imported(settings(tmp_path, sources={"v": {"path": path}}), tmp_path)


def test_a_prompt_is_in_one_split_and_never_in_an_evaluation_set(tmp_path):
    rows = many(200) + many(200, first="better") + [unified(prompt="what is asked, in the evaluation")]
    held = write(
        tmp_path / "held.jsonl",
        {"input": "Question 7", "targets": {"choices": ["a", "b"], "labels": [1, 0]}},
    )
    cfg = settings(tmp_path, sources={"u": {"path": write(tmp_path / "u.jsonl", *rows)}}, decontaminate=[held])
    splits, dropped, _ = imported(cfg, tmp_path)
    train, val = ({normalised(r["prompt"]) for r in splits[s]} for s in ("rm_train", "rm_val"))
    assert not train & val and len(train | val) == 199 and "question7" not in train | val
    assert dropped["u"] == {"prompt of an evaluation set": 3}
    share = cfg.data.splits.rm_val / (cfg.data.splits.rm_val + cfg.data.splits.rm_train)
    assert len(val) / 199 == pytest.approx(share, abs=0.08)
    assert len({r["pair_id"] for rows in splits.values() for r in rows}) == 398


def test_conversations_with_one_first_turn_are_in_one_split(tmp_path):
    rows = []
    for i in range(60):
        start = chat(f"question {i}", "an answer", "and then?")
        rows.append(unified(prompt=f"question {i}"))
        rows.append({"chosen": [*start, *chat("", "x")[1:]], "rejected": [*start, *chat("", "y")[1:]]})
    rows.append({"chosen": chat("What is asked in the evaluation?", "a", "b", "c"),
                 "rejected": chat("What is asked in the evaluation?", "a", "b", "d")})  # fmt: skip
    single, several = write(tmp_path / "a.jsonl", *rows[0:-1:2]), write(tmp_path / "b.jsonl", *rows[1::2], rows[-1])
    cfg = settings(tmp_path, sources={"a": {"path": single}, "b": {"path": several}})
    splits, dropped, _ = imported(cfg, tmp_path)
    first = {s: {r["prompt"][0]["content"] for r in rows} for s, rows in splits.items()}
    assert not first["rm_train"] & first["rm_val"] and all(first.values())
    assert len(splits["rm_train"]) + len(splits["rm_val"]) == 120
    assert dropped == {"a": {}, "b": {"prompt of an evaluation set": 1}}


def test_repeats_and_shares(tmp_path):
    path = write(tmp_path / "u.jsonl", *many(3), *many(3))
    _, dropped, _ = imported(settings(tmp_path, sources={"u": {"path": path}}), tmp_path)
    assert dropped == {"u": {"duplicate": 3}}
    broken = write(tmp_path / "b.jsonl", *many(9), unified(first=""))
    with pytest.raises(
        ArtefactError, match=r"sources\.b: 1 of 10 rows .* 0\.01: 1 x a response is empty \(b.jsonl row 10\)"
    ):
        imported(settings(tmp_path, sources={"b": {"path": broken}}), tmp_path, tmp_path)
    assert json.loads((tmp_path / "rejected.jsonl").read_text()) == {
        "reason": "a response is empty",
        "where": "b.jsonl row 10",
    }
    allowed = settings(tmp_path, sources={"b": {"path": broken}}, max_rejected_share=0.1)
    assert len(imported(allowed, tmp_path)[2].rows) == 1


def test_copies_that_contradict_each_other_are_both_left_out(tmp_path):
    first = write(tmp_path / "a.jsonl", *many(4))
    second = write(tmp_path / "b.jsonl", unified(0, 1, prompt="question 2"), unified(prompt="question 3"))
    sources = {"one": {"path": first}, "two": {"path": second}}
    splits, dropped, _ = imported(settings(tmp_path, sources=sources), tmp_path)
    kept = sorted(r["prompt"][0]["content"] for rows in splits.values() for r in rows)
    assert kept == ["question 0", "question 1", "question 3"]
    assert dropped == {
        "one": {"a copy prefers the other response": 1},
        "two": {"a copy prefers the other response": 1, "duplicate": 1},
    }


def test_rows_without_a_source_have_that_of_the_configuration(tmp_path):
    rows = [{"prompt": f"Hi {i}", "chosen": "good", "rejected": "bad"} for i in range(8)]
    path = write(tmp_path / "file.jsonl", *rows, {**rows[0], "prompt": "Bye", "source": "its own"})
    splits, _, _ = imported(settings(tmp_path, sources={"mine": {"path": path}}), tmp_path)
    assert {r["source"] for rows in splits.values() for r in rows} == {"mine", "its own"}


def test_the_share_of_bad_ratings_is_of_rows_not_of_pairs(tmp_path):
    """Ten responses to one prompt are 45 pairs; one bad row of eleven is a share of 1 / 11."""
    rows = [{"prompt": "Hi", "response": f"r{i}", "rating": i} for i in range(10)]
    path = write(tmp_path / "r.jsonl", *rows, {"prompt": "Hi", "response": "", "rating": 3})
    with pytest.raises(ArtefactError, match="r: 1 of 11 rows are malformed"):
        imported(settings(tmp_path, sources={"r": {"path": path}}, max_rejected_share=0.05), tmp_path)
