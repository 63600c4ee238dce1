"""The stage that collects prompts."""

import json

import pytest

from core.config import Config
from core.errors import ArtefactError
from core.files import read_table
from pipelines.prompts import run
from tests.builders.pair_files import chat


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
