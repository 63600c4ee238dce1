"""Answers that keep the marks of a dialogue or of a chat template are read as the texts they stand for."""

import pytest

from core.config import PreferenceSource
from core.data.sources import read_pairs
from core.data.tables import Malformed
from tests.builders.pair_files import chat, write

CHATML = ("<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>")
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
)
GEMMA = ("<bos><start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n{}<end_of_turn>\n")
OTHER_TURNS = "an answer is rendered as other turns than one of the assistant"
HH = ("\n\nHuman: {}", "\n\nAssistant: {}")


def read(tmp_path, prompt, chosen, rejected):
    malformed = Malformed()
    file = write(tmp_path / "a.jsonl", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return list(read_pairs(PreferenceSource(path=file), malformed)), malformed


@pytest.mark.parametrize("form", [CHATML, LLAMA3, GEMMA, HH], ids=["chatml", "llama 3", "gemma", "hh"])
def test_the_header_of_an_answer_is_no_part_of_it(tmp_path, form):
    user, assistant = form
    for prompt in (user.format("Hi"), *(["Hi", chat("Hi")] if form is not HH else [])):
        (pair,), _ = read(tmp_path, prompt, assistant.format("x"), assistant.format("y"))
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (chat("Hi"), "x", "y")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (CHATML[0].format("Hi"), OTHER_TURNS),
        (CHATML[1].format("x") + CHATML[0].format("y"), OTHER_TURNS),
        (CHATML[1].format(""), "a response is empty"),
    ],
    ids=["user", "two turns", "empty"],
)
def test_an_answer_of_other_turns_is_refused(tmp_path, answer, reason):
    found, malformed = read(tmp_path, CHATML[0].format("Why?"), "good", answer)
    assert not found and malformed.counts == {reason: 1}


def test_a_marker_within_an_answer_stays_text(tmp_path):
    """So does a header that only one of the answers to a plain prompt begins with."""
    for prompt in ("Hi", CHATML[0].format("Hi")):
        quoted = "Write <|im_start|>user\nHi<|im_end|> then."
        assert read(tmp_path, prompt, quoted, "y")[0][0]["chosen"] == quoted
    assert read(tmp_path, "Show a turn.", CHATML[1].format("x"), "y")[0][0]["chosen"] == CHATML[1].format("x")


def test_answers_to_a_dialogue_are_those_at_the_end_of_the_whole_dialogue(tmp_path):
    asked = "\n\nHuman: Hi\n\nAssistant:"
    (whole,), _ = read(tmp_path, None, asked + " x\n", asked + " y")
    (apart,), _ = read(tmp_path, asked, " x\n", " y")
    assert apart == whole and apart["chosen"] == "x"
