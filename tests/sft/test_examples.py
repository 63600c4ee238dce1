"""Labels of demonstrations: the assistant's tokens and no others."""

import re

import pytest
from transformers import AutoTokenizer

from core.config import Model, Sft
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.files import read_rows, read_table
from sft.examples import NO_LOSS, example, load_examples
from tests.builders.pair_files import write

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a fruit. The assistant may say apple."},
    {"role": "assistant", "content": "An apple, I think."},
    {"role": "user", "content": "Another?"},
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path) -> ChatTokenizer:
    return ChatTokenizer(Model(path=str(tokenizer_path)))


def by_the_rendering(folder, messages, turns: slice) -> tuple[list[int], list[int]]:
    """Ids and labels from the text that the template writes, by the places of characters: ChatML's markers are found
    in it, and a token is labelled where it lies between a header of the assistant and the end of that turn."""
    hf = AutoTokenizer.from_pretrained(folder)
    text = hf.apply_chat_template(messages, tokenize=False)
    text = text[: text.rindex("<|im_end|>") + len("<|im_end|>")]
    spans = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)][turns]
    made = hf(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(a <= start and stop <= b for a, b in spans) for start, stop in made["offset_mapping"]]
    return made["input_ids"], [i if yes else NO_LOSS for i, yes in zip(made["input_ids"], inside, strict=True)]


@pytest.mark.parametrize(("loss_on", "turns"), [("every_turn", slice(None)), ("last", slice(-1, None))])
def test_the_loss_is_on_the_assistants_tokens(tokenizer_path, tokenizer, loss_on, turns):
    answer = "A pear, of course."
    found = example(TALK, answer, tokenizer, loss_on)
    expected = by_the_rendering(tokenizer_path, [*TALK, {"role": "assistant", "content": answer}], turns)
    assert (found.ids, found.labels) == expected
    labelled = tokenizer.hf.decode([i for i in found.labels if i != NO_LOSS])
    earlier = "An apple, I think.<|im_end|>" if loss_on == "every_turn" else ""
    assert labelled == earlier + "A pear, of course.<|im_end|>"


def load(data, tokenizer, out=None, *, held_out=frozenset(), positions=10_000, **options):
    sft = Sft(data=data, **{"global_batch": 2, "val_share": 0.0, **options})
    return load_examples(
        sft, tokenizer, system="Be brief.", held_out=set(held_out), positions=positions, seed=1, out=out
    )


def test_what_is_left_out_is_counted(tokenizer, tmp_path):
    rows = [{"prompt": f"Say {i}", "completion": f"{i}."} for i in range(20)]
    rows += [rows[0], {"prompt": "Say much", "completion": "word " * 300}, {"prompt": "Held OUT!", "completion": "x"},
             {"messages": [{"role": "user", "content": "held out"}, {"role": "assistant", "content": "a"},
                           {"role": "user", "content": "More"}, {"role": "assistant", "content": "b"}]},
             {"prompt": "no answer"}]  # fmt: skip
    data = write(tmp_path / "a.jsonl", *rows)
    found = load(data, tokenizer, tmp_path, held_out={"heldout"}, max_tokens=128, max_rejected_share=0.1)
    assert len(found.train) == 20 and found.dropped == {
        "duplicate": 1, "longer than sft.max_tokens, or than the model takes": 1,
        "prompt of the splits eval or calibration": 2,
    }  # fmt: skip
    assert [row["where"] for row in read_rows(tmp_path / "rejected.jsonl")] == ["a.jsonl row 25"]
    table = read_table(tmp_path / "demonstrations.parquet")
    assert {row["prompt"][0]["content"] for row in table} == {"Be brief."} and len(table) == 20
    with pytest.raises(ArtefactError, match=r"1 of 25 rows are malformed, more than sft.max_rejected_share 0\.01"):
        load(data, tokenizer)
    with pytest.raises(ArtefactError, match="20 demonstrations to train on are fewer than sft.global_batch 32"):
        load(data, tokenizer, held_out={"heldout"}, max_tokens=128, max_rejected_share=0.1, global_batch=32)
    assert not load(data, tokenizer, max_rejected_share=0.1, positions=128).val


def test_a_conversation_is_held_out_with_those_that_it_begins(tokenizer, tmp_path):
    """By the first user turn, whatever order the rows have and whichever others there are."""
    turns = lambda i, *more: {  # noqa: E731
        "messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "Yes."}, *more]
    }
    more = [{"role": "user", "content": "Again"}, {"role": "assistant", "content": "No."}]
    rows = [turns(i) for i in range(60)] + [turns(i, *more) for i in range(60)]
    both = []
    for name, given in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        found = load(write(tmp_path / f"{name}.jsonl", *given), tokenizer, tmp_path / name, val_share=0.3)
        table = read_table(tmp_path / name / "demonstrations.parquet")
        splits = {(row["prompt"][1]["content"], len(row["prompt"])): row["split"] for row in table}
        assert all(splits[f"Say {i}", 2] == splits[f"Say {i}", 4] for i in range(60))
        assert 20 < len(found.val) < 52 and len(found.val) + len(found.train) == 120
        both.append(found)
    assert both[0] == both[1]._replace(malformed=both[0].malformed)
