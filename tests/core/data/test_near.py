"""Prompts that repeat others."""

import pytest

from core.data.near import NEAR, Known
from tests.builders.pair_files import chat

SYSTEM = {"role": "system", "content": "You are a helpful assistant who answers in one or two short plain sentences."}
LONG = "one two three four five six seven eight nine ten"  # eight trigrams


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (f"  {LONG.title()}!", "exactly"),
        (f"{LONG} eleven", "nearly"),  # 8 of 9
        (f"{LONG} eleven twelve", "nearly"),  # 8 of 10
        (f"{LONG} eleven twelve thirteen", None),  # 8 of 11
        ("zero " + LONG, "nearly"),
        ("one two three", None),
        ("one two", None),
        ("Hi", "exactly"),
    ],
)
def test_the_share_of_trigrams_decides(prompt, expected):
    assert NEAR == 0.8 and Known([chat("Hi"), chat(LONG)]).repeated_by(chat(prompt)) == expected


def test_a_system_message_that_prompts_share_makes_no_duplicates():
    known = Known([[SYSTEM, *chat("Name a fruit.")]])
    assert known.repeated_by([SYSTEM, *chat("Name a city.")]) is None
    assert known.repeated_by(chat("Name a fruit")) == "exactly"


def test_turns_are_compared_together():
    known = Known([chat("Hi", "Hello", "Name three large rivers of Asia, please")])
    assert known.repeated_by(chat("Name three large rivers of Asia, please")) is None
    assert known.repeated_by(chat("Hi", "Hello", "Name three large rivers of Asia")) == "nearly"
    assert Known([]).repeated_by(chat("Hi")) is None
