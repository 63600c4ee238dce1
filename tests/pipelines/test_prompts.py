"""The stage that collects prompts."""

import json

import pytest

from core.config import Config
from core.errors import ArtefactError, DataError
from core.files import read_table
from pipelines import stages
from pipelines.prompts import run
from pipelines.stages import STAGES, fingerprint
from tests.builders.pair_files import chat
from tests.builders.tokenizers import of_family


@pytest.fixture
def stage(tokenizer_path, tmp_path):
    """Runs the stage on lines; its metrics, prompts and rejected rows."""

    def collect(*rows, **data):
        file = tmp_path / "prompts.jsonl"
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        data = {"prompts": file, "max_prompt_tokens": 200} | data
        metrics = run(Config.model_validate({"policy": {"path": str(tokenizer_path)}, "data": data}), {}, tmp_path)
        rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
        return metrics, read_table(tmp_path / "prompts.parquet"), rejected

    return collect


def questions(n):
    return [{"prompt": f"What is {i} plus {i + 1}, and why?"} for i in range(n)]


def test_prompts_stage_counts_what_it_drops(stage):
    rows = questions(50)
    rows += [rows[0], {"prompt": "word " * 500}, {"prompt": ""}, {"text": "x"}]
    metrics, _, rejected = stage(*rows, max_rejected_share=0.05)
    assert sum(metrics["prompts"].values()) == 50
    assert metrics["rejected"] == {
        "duplicate": 1, "longer than data.max_prompt_tokens": 1, "no prompt": 1,
        "neither `prompt` nor `messages`": 1,
    }  # fmt: skip
    assert [r["line"] for r in rejected] == [51, 52, 53, 54]


def test_too_many_malformed_prompts_are_an_error(stage, tmp_path):
    """As with pairs; repeated and long prompts are no fault of the file."""
    rows = [*questions(8), {"prompt": None}, "{broken"]
    message = (
        r"2 of 10 rows are malformed, more than data\.max_rejected_share 0\.01: 1 x no prompt \(first in row 9\); "
        r"1 x not JSON \(first in row 10\)"
    )
    with pytest.raises(ArtefactError, match=message):
        stage(*rows)
    assert [json.loads(line)["line"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()] == [9, 10]
    assert sum(stage(*rows, max_rejected_share=0.2)[0]["prompts"].values()) == 8
    assert len(stage(*questions(4), *questions(4), {"prompt": "word " * 500})[2]) == 5


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why?"}, chat("Why?")),
        ({"prompt": chat("Hi", "Yes?", "Why?")}, chat("Hi", "Yes?", "Why?")),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}, chat("Why?")),
        ({"prompt": "Why?", "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, *chat("Why?")]),
        ({"prompt": "Why?", "history": [["Hi", "Yes?"]]}, chat("Hi", "Yes?", "Why?")),
        ({"messages": chat("Hi", "Yes?", "Why?")}, chat("Hi", "Yes?", "Why?")),
        ({"instruction": "Translate", "input": "pear"}, chat("Translate\npear")),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"}, chat("Hi", "Yes?", "Why?")),
    ],
)
def test_prompts_in_the_forms_of_other_tools(stage, row, expected):
    _, prompts, rejected = stage(row)
    assert prompts[0]["prompt"] == expected and not rejected


def test_prompts_with_tools_are_refused_by_name(stage):
    metrics, _, _ = stage(*questions(3), {"prompt": "Weather?", "tools": [{"name": "w"}]}, max_rejected_share=0.5)
    assert metrics["rejected"] == {"tools": 1}


def test_system_turns_that_the_template_has_none_for_are_counted(tokenizer_path, tmp_path):
    """Gemma's template refuses them; `data.system` gives one to every prompt."""
    marks = ["<pad>", "<start_of_turn>", "<end_of_turn>"]
    policy = of_family(tokenizer_path, tmp_path / "policy", "gemma", marks, bos_token="<filename>", pad_token="<pad>")
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"What is {i} plus {i}?"}) for i in range(20)))
    sections = {"policy": {"path": str(policy)}, "data": {"prompts": file, "system": "You are a pirate."}}
    metrics = run(Config.model_validate(sections), {}, tmp_path)
    assert metrics["system_moved"] == 20 and not metrics["rejected"]
    sections["policy"]["system_turn"] = "refuse"
    with pytest.raises(Exception, match="has no system turn, and system_turn is refuse"):
        run(Config.model_validate(sections), {}, tmp_path)


def test_a_template_that_leaves_a_choice_is_one_error_not_one_of_each_row(tokenizer_path, tmp_path):
    policy = of_family(
        tokenizer_path, tmp_path / "policy", "qwen3", ["<pad>"], eos_token="<|im_end|>", pad_token="<pad>"
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Hi"}))
    sections = {"policy": {"path": str(policy)}, "data": {"prompts": tmp_path / "prompts.jsonl"}}
    with pytest.raises(DataError, match="Set generation_prompt of policy and rm.base to answer"):
        run(Config.model_validate(sections), {}, tmp_path)
    sections["policy"]["template_kwargs"] = {"enable_thinking": False}
    assert run(Config.model_validate(sections), {}, tmp_path)["prompts"]


def test_evaluation_prompts_from_another_file(stage, tmp_path):
    """They alone are the split eval. What repeats a prompt of another split is left out, counted; what repeats one that
    the split eval would have had is not."""
    splits = {"rm_train": 0.3, "rm_val": 0.1, "rl_train": 0.2, "calibration": 0.1, "eval": 0.3}
    _, before, _ = stage(*questions(60), splits=splits)
    text = lambda row: row["prompt"][-1]["content"]  # noqa: E731
    replaced = [text(row) for row in before if row["split"] == "eval"]
    trained = [text(row) for row in before if row["split"] != "eval"]
    others = ["Write a poem.", trained[0].upper() + " ", trained[1] + " Say.", replaced[0], "Name a fruit.", ""]
    file = tmp_path / "others.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in [*others, others[0]]))
    metrics, prompts, rejected = stage(*questions(60), eval_prompts=file, splits=splits, max_rejected_share=0.2)
    assert {text(row) for row in prompts if row["split"] == "eval"} == {others[0], replaced[0], others[4]}
    assert [row for row in prompts if row["split"] != "eval"] == [row for row in before if row["split"] != "eval"]
    assert (metrics["rejected"], rejected) == ({}, [])
    assert metrics["eval_rejected"] == {
        "repeats a prompt of another split": 1, "nearly repeats a prompt of another split": 1, "no prompt": 1,
        "duplicate": 1,
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "eval_rejected.jsonl").read_text().splitlines()]
    assert [r["line"] for r in lines] == [2, 3, 6, 7] and lines[1]["row"] == {"prompt": others[2]}


def test_a_file_of_evaluation_prompts_that_holds_nothing_new_is_an_error(stage, tmp_path):
    file = tmp_path / "others.jsonl"
    file.write_text(json.dumps(questions(3)[1]))
    none = {"rm_train": 1.0, "rm_val": 0.0, "rl_train": 0.0, "calibration": 0.0, "eval": 0.0}
    with pytest.raises(ArtefactError, match=r"others.jsonl: no usable prompt: .* another split"):
        stage(*questions(3), eval_prompts=file, splits=none)
    with pytest.raises(ValueError, match="eval_prompts is the file of prompts itself"):
        stage(*questions(3), eval_prompts=tmp_path / "prompts.jsonl")


def test_another_file_of_evaluation_prompts_makes_the_stage_run_again(tmp_path):
    """By content; and a file that is not there is named before anything runs."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    other = tmp_path / "others.jsonl"

    def inputs(**data) -> dict[str, str]:
        policy = {"path": str(tmp_path)}
        cfg = Config.model_validate({"policy": policy, "data": {"prompts": tmp_path / "prompts.jsonl"} | data})
        return fingerprint(STAGES["prompts"], cfg).inputs

    with pytest.raises(ArtefactError, match="data.eval_prompts: no file"):
        inputs(eval_prompts=other)
    found = []
    for text in ("Why?", "How?"):
        other.write_text(json.dumps({"prompt": text}))
        stages._digests.clear()
        found.append(inputs(eval_prompts=other)[f"data.eval_prompts={other}"])
    assert found[0] != found[1] and not any("eval_prompts" in key for key in inputs())


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"caf\xe9 \xff\n", "1 x not UTF-8 .first in row 1"), (b"[1, 2]\n", "1 x not an object .first in row 1"),
     (b'"text"\nnull\n3\n', "3 x not an object"), (b"", "the file holds no rows"),
     (b"\n \n", "the file holds no rows")],
)  # fmt: skip
def test_a_file_that_is_no_prompts_is_named(tokenizer_path, tmp_path, content, said):
    file = tmp_path / "prompts.jsonl"
    for more in (b"", b'{"prompt": "Why?"}\n'):
        if more and "no rows" in said:
            continue
        file.write_bytes(content + more)
        cfg = Config.model_validate({"policy": {"path": str(tokenizer_path)}, "data": {"prompts": file}})
        with pytest.raises(ArtefactError, match=said):
            run(cfg, {}, tmp_path)


def test_a_folder_is_no_file_of_prompts(tokenizer_path, tmp_path):
    cfg = Config.model_validate({"policy": {"path": str(tokenizer_path)}, "data": {"prompts": tmp_path}})
    with pytest.raises(ArtefactError, match="is a folder: give a .jsonl"):
        run(cfg, {}, tmp_path)


def test_metadata_of_a_prompt_is_kept_as_it_was_written(stage):
    """Of rows that differ in type; a row without it is malformed, and nothing is kept that was not asked for."""
    answers = [3, "three", [1, 2], {"is": "é"}, 0, False]
    rows = [{**row, "answer": answer, "other": 1} for row, answer in zip(questions(6), answers, strict=True)]
    rows += [questions(8)[6], {**questions(8)[7], "answer": None}]
    metrics, prompts, rejected = stage(*rows, metadata=("answer",), max_rejected_share=0.5)
    assert metrics["rejected"] == {"no answer": 2} and [r["line"] for r in rejected] == [7, 8]
    kept = {row["prompt"][-1]["content"]: json.loads(row["metadata"]) for row in prompts}
    assert kept == {row["prompt"]: {"answer": row["answer"]} for row in rows[:6]}
    assert "metadata" not in stage(*rows[:6])[1][0]
