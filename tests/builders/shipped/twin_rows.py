"""Rows in the layouts that the shipped configurations read, and evaluation sets for their reward models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from core.files import write_table
from tests.builders.pair_files import chat, unified, write
from tests.builders.processes import ROOT

ADJECTIVES = ("small", "old", "quiet", "red", "quick", "round", "cold", "bright", "plain", "soft")
NOUNS = ("boat", "garden", "letter", "river", "window", "horse", "market", "song", "stone", "lamp")


def _thing(i: int) -> str:
    return f"{ADJECTIVES[i % 10]} {NOUNS[i // 10 % 10]} number {i}"


def _questions(n: int) -> list[str]:
    return [f"What would you do with a {_thing(i)}?" for i in range(n)]


def unified_feedback(folder: Path) -> Path:
    """As llm-blender/Unified-Feedback: enough for a stride of 20, ties and posts to summarise among them."""
    found = []
    for i, question in enumerate(_questions(8000)):
        source = "openai/summarize_from_feedback" if i % 3 == 0 else "argilla/ultrafeedback"
        rating = 0 if i % 10 == 9 else i % 2
        found.append(unified(rating, 0 if i % 10 == 9 else 1 - rating, source=source, prompt=question,
                             first=f"I would paint the {NOUNS[i % 10]}.", second=f"Nothing {i % 7}."))  # fmt: skip
    return write(folder / "unified.jsonl", *found)


def preference_700k(folder: Path) -> Path:
    """As hendrydong/preference_700K: chats of one or two turns, and scores."""
    return write(folder / "pairs.jsonl", *(
        {"chosen": [*_before(i), *chat(q, f"I would keep the {NOUNS[i % 10]}.")],
         "rejected": [*_before(i), *chat(q, "I do not know.")], "chosen_score": 1.0, "rejected_score": 0.0}
        for i, q in enumerate(_questions(300))
    ))  # fmt: skip


def skywork(folder: Path) -> Path:
    """As Skywork-Reward-Preference-80K-v0.2: the same chats, and where they are from."""
    return write(folder / "pairs.jsonl", *(
        {"chosen": [*_before(i), *chat(q, f"I would keep the {NOUNS[i % 10]}.")],
         "rejected": [*_before(i), *chat(q, "I do not know.")], "source": "magpie_ultra"}
        for i, q in enumerate(_questions(300))
    ))  # fmt: skip


def _before(i: int) -> list[dict]:
    return chat(f"Do you know the {_thing(i)}?", "Yes.") if i % 3 == 0 else []


def hh(folder: Path) -> Path:
    """As Anthropic/hh-rlhf: whole dialogues as texts."""
    return write(folder / "pairs.jsonl", *(
        {side: f"\n\nHuman: {q}\n\nAssistant: {answer}" for side, answer in
         (("chosen", f"I would keep the {NOUNS[i % 10]}."), ("rejected", "I do not know."))}
        for i, q in enumerate(_questions(300))
    ))  # fmt: skip


def prompts(folder: Path) -> Path:
    """The prompts of Unified-Feedback, by the command of docs/paper.md."""
    out, number = folder / "prompts.jsonl", "900"
    command = [sys.executable, "scripts/prompts_of_pairs.py", unified_feedback(folder), out, "--number", number]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def alpaca(folder: Path) -> Path:
    """As tatsu-lab/alpaca, a Parquet file."""
    write_table(folder / "alpaca.parquet", [
        {"instruction": q, "input": f"It is {ADJECTIVES[i % 10]}." if i % 3 == 0 else "", "output": "Nothing.",
         "text": q} for i, q in enumerate(_questions(900))
    ])  # fmt: skip
    return folder / "alpaca.parquet"


def evaluation_sets(folder: Path) -> list[str]:
    """`--set` for the four sets of the paper's tables, with some rows each."""
    asked = list(enumerate(_questions(8)))
    subsets = ("alpacaeval-easy", "llmbar-natural", "donotanswer", "math-prm")
    sets = {
        "unified": [unified(i % 2, 1 - i % 2, prompt=q) for i, q in asked],
        "hhh": [
            {"input": q, "targets": {"choices": ["Keep it.", "No."], "labels": [1, 0]}}
            for _, q in asked
        ],
        "mt_bench": [
            {"question_id": i, "turn": 1, "model_a": "x", "model_b": "y", "winner": ("model_a", "model_b")[i % 2],
             "judge": "gpt-4", "conversation_a": chat(q, "Keep it."), "conversation_b": chat(q, "No.")}
            for i, q in asked
        ],
        "rewardbench": [
            {"id": i, "subset": subsets[i % 4], "prompt": q, "chosen": "Keep it.", "rejected": "No."} for i, q in asked
        ],
    }  # fmt: skip
    return [f"--set={name}={write(folder / f'{name}-set.jsonl', *found)}" for name, found in sets.items()]
