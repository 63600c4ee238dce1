"""Readers of the layouts: the columns of a row -> drafts of pairs, or a rated answer. What all have in common is done
in `core.data.layouts.pairing`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations, product
from typing import Any

from core.data.layouts.messages import is_filled
from core.data.layouts.pairing import Draft, Rated
from core.errors import DataError

Row = Mapping[str, Any]

SUMMARISE = "Generate one-sentence summary for the following post: "
"""Put before the first turn of the `summarize` sources of Unified-Feedback, as the GRM authors do, because their rows
hold the post alone."""
RATINGS = ("rating", "score", "overall_score", "helpfulness")
"""Columns of the `ratings` layout, in order of preference."""
SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"), ("rating_chosen", "rating_rejected"),
)  # fmt: skip
"""Columns of the ratings of a pair, in order of preference."""
PROMPTS = ("prompt", "instruction", "input", "question", "conversations")
"""Columns of a prompt; `input` is what an instruction is about."""


def number(value: Any) -> float:
    """A finite number; DataError for anything else."""
    read = float("nan") if value is None or isinstance(value, bool) else float(value)
    if not math.isfinite(read):
        raise DataError("a rating is not a finite number")
    return read


def asked(row: Row) -> Any:
    """The prompt of a row; None where it has none."""
    if not is_filled(row.get("prompt")) and is_filled(instruction := row.get("instruction")):
        return f"{instruction}\n{row['input']}" if is_filled(row.get("input")) else instruction
    return next((row[name] for name in ("prompt", "question", "conversations") if is_filled(row.get(name))), None)


def said(row: Row, name: str) -> Any:
    """What a column holds as an answer; DataError, which names the column, for neither text nor messages."""
    value = row[name]
    if value is None or isinstance(value, str | list | Mapping):
        return value
    raise DataError(f"{name} is neither a text nor messages but {type(value).__name__}")


def unified(row: Row) -> list[Draft]:
    draft = _rated_two(None, (row["conv_A"], row["conv_A_rating"]), (row["conv_B"], row["conv_B_rating"]))
    if "summarize" not in str(row.get("source")):
        return [draft]
    chats = [[dict(message) for message in chat] for chat in (draft.chosen, draft.rejected)]
    for chat in chats:
        chat[0]["content"] = SUMMARISE + chat[0]["content"].strip()
    return [Draft(None, chats[0], chats[1], draft.margin, draft.tie)]


def trl(row: Row) -> list[Draft]:
    margin = row.get("margin")
    for better, worse in SCORES:
        if margin is None and row.get(better) is not None and row.get(worse) is not None:
            margin = number(row[better]) - number(row[worse])
    margin = None if margin is None else number(margin)
    if margin is not None and margin < 0:
        raise DataError("the rating of rejected exceeds that of chosen")
    return [Draft(asked(row), said(row, "chosen"), said(row, "rejected"), margin, margin == 0)]


def outputs(row: Row) -> list[Draft]:
    if not isinstance(row["output"], list) or len(row["output"]) != 2:
        raise DataError("output is no list of two answers")
    return [Draft(asked(row), *row["output"])]


def candidates(row: Row) -> list[Draft]:
    if not isinstance(row["chosen"], list) or not isinstance(row["rejected"], list):
        raise DataError("chosen and rejected are not both lists of texts")
    return [Draft(row["prompt"], *pair) for pair in product(row["chosen"], row["rejected"])]


def completions(row: Row) -> list[Draft]:
    rated = [(c["response"], c["overall_score"]) for c in row["completions"]]
    return [_rated_two(row["instruction"], *two) for two in combinations(rated, 2)]


def ranked(row: Row) -> list[Draft]:
    answers = [(a["answer"], -number(a["rank"])) for a in row["answers"]]  # rank 1 is the best
    drafts = [_rated_two(row["prompt"], *two) for two in combinations(answers, 2)]
    return [Draft(d.prompt, d.chosen, d.rejected, None, d.tie) for d in drafts]


def helpsteer(row: Row) -> list[Draft]:
    """HelpSteer2-preference and HelpSteer3: from -3, the first is much better, to 3."""
    if "overall_preference" in row:
        strength, two = number(row["overall_preference"]), (said(row, "response1"), said(row, "response2"))
    else:
        strength, two = number(row["preference_strength"]), (said(row, "response_1"), said(row, "response_2"))
    chosen, rejected = two if strength < 0 else two[::-1]
    prompt = row["context"] if "overall_preference" in row else row["prompt"]
    return [Draft(prompt, chosen, rejected, abs(strength), strength == 0)]


def safe_rlhf(row: Row) -> list[Draft]:
    return [_better(row["prompt"], [said(row, "response_0"), said(row, "response_1")], row["better_response_id"])]


def shp(row: Row) -> list[Draft]:
    return [_better(row["history"], [said(row, "human_ref_B"), said(row, "human_ref_A")], row["labels"])]


def webgpt(row: Row) -> list[Draft]:
    prompt = row["question"]["full_text"]
    return [_rated_two(prompt, *((said(row, f"answer_{i}"), row[f"score_{i}"]) for i in (0, 1)))]


def summaries(row: Row) -> list[Draft]:
    """The post as arXiv 2009.01325 shows it to its models; an article of CNN/DM has no title and no subreddit."""
    info, texts = row["info"], [summary["text"] for summary in row["summaries"]]
    if is_filled(info.get("post")):
        post = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}"
    else:
        post = info["article"]
    return [_better(f"{post}\n\nTL;DR:", texts, row["choice"])]


def alpaca_farm(row: Row) -> list[Draft]:
    return [_better(asked(row), [said(row, "output_1"), said(row, "output_2")], int(row["preference"]) - 1)]


def answers(row: Row) -> list[Draft]:
    return [_better(asked(row), row["answers"], row["preference"])]


def arena(row: Row) -> list[Draft]:
    chosen, rejected, tie = winner(row["winner"])
    chats = {"model_a": row["conversation_a"], "model_b": row["conversation_b"]}
    return [Draft(None, chats[chosen], chats[rejected], None, tie)]


def arena_votes(row: Row) -> list[Draft]:
    """Prompts and answers are JSON lists of the turns."""
    prompts, *sides = (_list(row[name]) for name in ("prompt", "response_a", "response_b"))
    chats = []
    for said in sides:
        if len(said) != len(prompts):
            raise DataError("prompt and answers have different numbers of turns")
        turns = zip(prompts, said, strict=True)
        chats.append(
            [{"role": r, "content": t} for two in turns for r, t in zip(("user", "assistant"), two, strict=True)]
        )
    votes = [number(row[f"winner_{name}"]) for name in ("model_a", "model_b", "tie")]
    if sorted(votes) != [0, 0, 1]:
        raise DataError("winner_model_a, winner_model_b and winner_tie are not one 1 and two 0")
    first = votes[1] != 1
    return [Draft(None, chats[not first], chats[first], None, votes[2] == 1)]


def ppe(row: Row) -> list[Draft]:
    chosen, rejected, tie = winner(row["winner"])
    answer = {"model_a": said(row, "response_1"), "model_b": said(row, "response_2")}
    return [Draft(row["prompt"], answer[chosen], answer[rejected], None, tie)]


def rated(row: Row) -> Rated:
    column = next((name for name in RATINGS if name in row), None)
    if column is None:
        raise DataError(f"none of the columns {', '.join(RATINGS)}")
    return Rated(row["prompt"], said(row, "response"), number(row[column]))


def kto(row: Row) -> Rated:
    label = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}.get(str(row["label"]).lower())
    if label is None:
        raise DataError("label is neither true nor false")
    return Rated(row["prompt"], said(row, "completion"), label)


def winner(value: object) -> tuple[str, str, bool]:
    """(side of the chosen response, side of the rejected one, whether they tie)."""
    if value in ("model_a", "model_b"):
        return str(value), "model_b" if value == "model_a" else "model_a", False
    if value == "both_bad" or (isinstance(value, str) and value.startswith("tie")):  # also "tie (bothbad)"
        return "model_a", "model_b", True
    raise DataError("winner is none of model_a, model_b, tie")


def _rated_two(prompt: Any, first: tuple[Any, Any], second: tuple[Any, Any]) -> Draft:
    a, b = number(first[1]), number(second[1])
    chosen, rejected = (first[0], second[0]) if a >= b else (second[0], first[0])
    return Draft(prompt, chosen, rejected, abs(a - b), a == b)


def _better(prompt: Any, two: list[Any], index: Any) -> Draft:
    """A draft of two answers, of which the one at `index` is better."""
    if len(two) != 2 or isinstance(index, bool) or str(index) not in ("0", "1", "0.0", "1.0"):
        raise DataError("the label names neither of two answers")
    chosen = int(float(index))
    return Draft(prompt, two[chosen], two[1 - chosen])


def _list(value: Any) -> list[Any]:
    """A JSON list, which a text may hold."""
    read = json.loads(value) if isinstance(value, str) else value
    if not isinstance(read, list):
        raise DataError("a column is no list of turns")
    return read
