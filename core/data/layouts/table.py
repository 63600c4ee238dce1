"""The table of layouts: by which columns each is told, what reads it, and what its rows are read as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from core.data.layouts import readers
from core.data.layouts.messages import is_filled
from core.data.layouts.pairing import CONTEXT
from core.data.layouts.text import is_conversation
from core.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    name: str
    """As in `preferences.sources.*.layout`."""
    sets: str
    """Published sets that are written so."""
    told_by: tuple[tuple[str, ...], ...]
    """Alternatives of columns; a row that has all columns of one of them has the layout, if `when` holds too."""
    read: Callable[[Row], Any]
    """The pairs of a row as `Draft`s, in a list; its answer as `Rated` where `rated` holds."""
    read_as: str
    """What a row is read as, for docs/data.md."""
    also: tuple[str, ...] = ()
    """Further columns that are read."""
    when: Callable[[Row], bool] | None = None
    condition: str = ""
    """`when` in words."""
    rated: bool = False
    """One rated answer a row, so that a pair is made of two rows with one prompt."""

    def fits(self, row: Row) -> bool:
        return any(row.keys() >= set(columns) for columns in self.told_by) and (self.when is None or self.when(row))

    def check(self, row: Row) -> None:
        """DataError for a row that has the columns, but not as the layout needs them; KeyError for a missing column."""
        if self.when is not None and not self.when(row):
            raise DataError(f"does not fit the layout {self.name}: {', '.join(self.told_by[0])} ({self.condition})")

    @cached_property
    def columns(self) -> frozenset[str]:
        """All columns that the layout reads itself."""
        return frozenset(name for columns in self.told_by for name in columns) | set(self.also)


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _lists_of_texts(row: Row) -> bool:
    return _texts(row["chosen"]) and _texts(row["rejected"])


def _dialogues(row: Row) -> bool:
    texts = (row["chosen"], row["rejected"])
    return not is_filled(readers.asked(row)) and all(
        is_conversation(text) or (isinstance(text, str) and "Assistant:" in text) for text in texts
    )


_PAIR = ("chosen", "rejected")
_OF_PAIR = (*readers.PROMPTS, "margin", *(name for pair in readers.SCORES for name in pair))
"""What `readers.trl` reads beside the answers."""

_TABLE = (
    Layout("unified", "Unified-Feedback", (("conv_A", "conv_B"),), readers.unified,
           "the conversation with the higher rating is chosen; margin is the difference",
           also=("conv_A_rating", "conv_B_rating")),
    Layout("arena", "Arena conversations", (("conversation_a", "conversation_b", "winner"),), readers.arena,
           "the winner's conversation is chosen; any kind of tie is a tie"),
    Layout("arena_votes", "Arena-55k", (("prompt", "response_a", "response_b", "winner_model_a"),),
           readers.arena_votes, "as arena; prompt and answers are JSON lists of the turns",
           also=("winner_model_b", "winner_tie")),
    Layout("ppe", "PPE human preference", (("prompt", "response_1", "response_2", "winner"),), readers.ppe,
           "the winner's answer is chosen; any kind of tie is a tie"),
    Layout("helpsteer", "HelpSteer2-preference, HelpSteer3",
           (("prompt", "response_1", "response_2", "preference_strength"),
            ("context", "response1", "response2", "overall_preference")), readers.helpsteer,
           "a strength below 0 prefers the first answer, above 0 the second; margin is its size, 0 is a tie"),
    Layout("safe_rlhf", "PKU-SafeRLHF", (("prompt", "response_0", "response_1", "better_response_id"),),
           readers.safe_rlhf, "the better response, not the safer one, is chosen"),
    Layout("shp", "SHP", (("history", "human_ref_A", "human_ref_B", "labels"),), readers.shp,
           "history is the prompt; labels 1 prefers A; votes give no margin"),
    Layout("webgpt", "WebGPT comparisons", (("question", "answer_0", "answer_1", "score_0", "score_1"),),
           readers.webgpt, "the answer with the higher score is chosen; equal scores tie; quotes are not shown"),
    Layout("summaries", "summarize_from_feedback", (("info", "summaries", "choice"),), readers.summaries,
           "prompt is subreddit, title and post (or the article), and ends with TL;DR:"),
    Layout("alpaca_farm", "AlpacaFarm", (("instruction", "output_1", "output_2", "preference"),),
           readers.alpaca_farm, "preference is 1 or 2", also=("input",)),
    Layout("answers", "Coste et al.", (("instruction", "answers", "preference"),), readers.answers,
           "preference is the index of the better answer", also=("input",)),
    Layout("completions", "UltraFeedback", (("instruction", "completions"),), readers.completions,
           "each two answers are a pair, by overall_score; margin is the difference. The system prompts, which differ "
           "between answers, are not shown"),
    Layout("ranked", "Nectar", (("prompt", "answers"),), readers.ranked,
           "each two answers are a pair, by rank; ranks give no margin"),
    Layout("candidates", "RewardBench 2, RM-Bench", (("prompt", *_PAIR),), readers.candidates,
           "each chosen answer is a pair with each rejected one", when=_lists_of_texts,
           condition="both lists of texts"),
    Layout("hh", "HH-RLHF", (_PAIR,), readers.trl, "the last turn of each is the answer, all before it the prompt",
           also=_OF_PAIR, when=_dialogues, condition="texts with turns of both sides, no prompt"),
    Layout("trl", "TRL, UltraFeedback-binarized, argilla's sets, Skywork-80K, preference_700K, Tulu 3, Orca, OpenRLHF, "
           "LLaMA-Factory, ShareGPT", (_PAIR,), readers.trl,
           "answers are texts, messages, or whole conversations with one prompt; two ratings, or margin, give the "
           "margin, and equal ratings a tie", also=_OF_PAIR),
    Layout("outputs", "LLaMA-Factory, earlier", (("instruction", "output"),), readers.outputs,
           "output is the better answer and the worse one", also=("input",),
           when=lambda row: isinstance(row["output"], list), condition="output a list"),
    Layout("kto", "KTO", (("prompt", "completion", "label"),), readers.kto,
           "a pair of each true and each false answer to one prompt; a prompt without both is refused", rated=True),
    Layout("ratings", "HelpSteer, HelpSteer2",
           tuple(("prompt", "response", rating) for rating in readers.RATINGS), readers.rated,
           "each two answers to one prompt are a pair; the rating is the first of these columns that a row has",
           rated=True),
)  # fmt: skip

LAYOUTS = {layout.name: layout for layout in _TABLE}
"""By name; a row has the first layout that fits."""


def recognise(row: Row, where: str) -> Layout:
    """The layout whose columns a row has; DataError, which names the nearest layouts, for other columns."""
    for layout in LAYOUTS.values():
        if layout.fits(row):
            return layout
    raise DataError(f"{where}: columns {', '.join(sorted(row))} are of no known layout; {_nearest(row)}")


def _nearest(row: Row) -> str:
    """What a row of no known layout was meant as: with its names spelt otherwise, else with the columns it lacks."""
    spelt = {name.lower(): name for layout in LAYOUTS.values() for name in layout.columns}
    respelt = {spelt.get(name.lower(), name): value for name, value in row.items()}
    if meant := next((layout for layout in LAYOUTS.values() if layout.fits(respelt)), None):
        other = [f"{name} to {new}" for name, new in ((n, spelt.get(n.lower(), n)) for n in row) if name != new]
        return f"rename {', '.join(other)} for the layout {meant.name}: names are compared letter by letter"
    lacking = [
        (layout, columns, [name for name in columns if name not in row])
        for layout in LAYOUTS.values()
        for columns in layout.told_by
    ]
    near = sorted((n for n in lacking if len(n[2]) < len(n[1])), key=lambda n: len(n[2]) / len(n[1]))
    if not near:
        return f"layouts are {', '.join(LAYOUTS)}, with the columns that docs/data.md names"
    needs = [
        f"{layout.name} ({', '.join(columns)}: {'lacks ' + ', '.join(lacks) if lacks else layout.condition})"
        for layout, columns, lacks in near[:3]
    ]
    return f"nearest are {'; '.join(needs)}. docs/data.md has all layouts"


def unread_columns(row: Row, layout: Layout) -> set[str]:
    """Columns with content that are read neither by the layout nor as the prompt's context."""
    known = layout.columns | {*CONTEXT, "source", "split"}
    if is_filled(row.get("prompt")):  # it comes before the other columns of a prompt
        known -= set(readers.PROMPTS) - {"prompt"} - {name for columns in layout.told_by for name in columns}
    return {name for name, value in row.items() if name not in known and is_filled(value)}
