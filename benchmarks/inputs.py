"""What the rows are given: preference pairs of natural lengths, prompts, and the reward model that both sides load."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

from benchmarks.workers import ROOT
from core.config import Model, PreferenceSource, RewardTraining, RewardVariant
from core.config.base import native_dtype
from core.data.chat import ChatTokenizer, with_system
from core.data.sources import read_pairs
from core.data.tables import Malformed
from core.files import read_rows
from pipelines.import_pairs import as_row
from rm.pairs import Pair, tokenise

POLICY = "models/SmolLM2-135M-Instruct"
MOST_TOKENS = 1024
"""Of a conversation, as TRL's `max_length`."""
POOL_PROMPT = 150
"""Tokens of the prompts that have many responses: the mean of HH-RLHF harmless."""
SYSTEM = "Answer in one or two short sentences."

# (prompt, chosen, rejected) in tokens of SmolLM2: every 36th of the 2,299 pairs of HH-RLHF harmless-base's test file,
# sorted by their sum. So their means (143, 41, 52) and their tails are those of the file (149, 41, 51).
LENGTHS = (
    (42, 7, 12), (35, 9, 25), (41, 18, 17), (36, 33, 11), (41, 15, 28), (69, 13, 5), (39, 24, 29), (44, 30, 23),
    (71, 22, 7), (39, 62, 4), (69, 13, 27), (51, 27, 35), (56, 19, 42), (55, 47, 20), (83, 19, 25), (56, 7, 69),
    (48, 31, 57), (79, 16, 44), (93, 37, 13), (45, 44, 58), (118, 18, 15), (55, 10, 91), (115, 10, 36), (82, 69, 13),
    (41, 118, 10), (38, 33, 101), (129, 30, 18), (101, 10, 69), (109, 18, 60), (102, 30, 58), (156, 19, 18),
    (111, 54, 32), (152, 30, 20), (91, 7, 110), (144, 18, 53), (183, 9, 28), (210, 8, 6), (158, 70, 2), (184, 16, 34),
    (194, 14, 32), (95, 76, 76), (171, 40, 41), (180, 23, 55), (99, 59, 110), (196, 35, 44), (55, 11, 217),
    (138, 78, 73), (202, 73, 25), (194, 53, 63), (135, 133, 53), (234, 55, 44), (68, 83, 190), (290, 24, 37),
    (169, 28, 167), (167, 155, 55), (222, 46, 127), (324, 28, 57), (266, 112, 52), (285, 108, 58), (359, 91, 26),
    (235, 12, 257), (436, 62, 52), (387, 121, 101), (683, 17, 17),
)  # fmt: skip


class TokenPair(TypedDict):
    """A pair as both sides get it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Pairs(NamedTuple):
    pairs: list[TokenPair]
    origin: str
    """For the reader: real pairs, or lengths alone."""


def tokenizer(policy: str = POLICY) -> ChatTokenizer:
    found = ChatTokenizer(Model(path=str(_there(policy))))
    found.check()
    return found


def natural_pairs(chat: ChatTokenizer, count: int) -> Pairs:
    """`count` pairs in a random order that is always the same.

    Those of HH-RLHF harmless where the folder of RLHF_DATA has them (docs/data.md); else random tokens, as many as such
    pairs have. Training steps take the same time on either.
    """
    file = Path(os.environ.get("RLHF_DATA", ROOT / "../shared/data")) / "unified" / "hh_harmless_base_test.jsonl"
    order = random.Random("benchmarks/pairs")
    if file.is_file():
        rows = [as_row(pair) for pair in read_pairs(PreferenceSource(path=file), Malformed())]
        order.shuffle(rows)
        limits = RewardTraining(max_tokens=MOST_TOKENS)
        found = [_plain(pair) for pair in tokenise(rows[: 2 * count], chat, limits, RewardVariant())[0]][:count]
        if len(found) == count:
            return Pairs(found, f"{count} pairs of HH-RLHF harmless, {_mean_tokens(found)}")
    lengths = [list(LENGTHS) for _ in range(-(-count // len(LENGTHS)))]
    for part in lengths:
        order.shuffle(part)
    found = [random_pair(order, chat, *sizes) for sizes in islice((s for part in lengths for s in part), count)]
    return Pairs(found, f"{count} pairs of random tokens with the lengths of HH-RLHF harmless, {_mean_tokens(found)}")


def random_pair(draw: random.Random, chat: ChatTokenizer, prompt: int, chosen: int, rejected: int) -> TokenPair:
    """Random tokens without special ones; responses end with the end of turn."""
    special = set(chat.hf.all_special_ids)
    plain = [token for token in range(chat.hf.vocab_size) if token not in special]
    ids = lambda count: draw.choices(plain, k=count)  # noqa: E731
    return {
        "prompt": ids(prompt),
        "chosen": [*ids(chosen - 1), chat.eot_id],
        "rejected": [*ids(rejected - 1), chat.eot_id],
    }


def prompts(chat: ChatTokenizer, count: int, *, most_tokens: int = 128) -> list[list[dict[str, str]]]:
    """`count` different prompts of data/prompts.jsonl as messages, in a random order that is always the same."""
    rows = [row["prompt"] for row in read_rows(ROOT / "data" / "prompts.jsonl")]
    random.Random("benchmarks/prompts").shuffle(rows)
    chats = (with_system([{"role": "user", "content": text}], SYSTEM) for text in dict.fromkeys(rows))
    return list(islice((chat_ for chat_ in chats if len(chat.prompt_ids(chat_)) <= most_tokens), count))


def reward_model(folder: Path, policy: str = POLICY) -> tuple[Path, Path]:
    """Two folders with one reward model, the policy under a random linear head: ours, and a classifier of transformers.

    Made in `folder` where they are not there yet.
    """
    import torch
    from torch import Tensor

    from core.models.loading import load_causal_lm
    from rm.model import RewardModel
    from rm.tools.export import export

    ours, classifier = folder / "reward_model", folder / "classifier"
    if not (ours.is_dir() and classifier.is_dir()):
        for old in (ours, classifier):
            shutil.rmtree(old, ignore_errors=True)
        base = Model(path=str(_there(policy)))
        # With its LM head, which what is exported has too.
        model = RewardModel(load_causal_lm(base, dtype=native_dtype()), "linear", ChatTokenizer(base))
        torch.manual_seed(0)
        with torch.no_grad():  # as wide as the states are long, so that rewards are of the size of 1
            weight = cast(Tensor, model.head.weight)
            weight.normal_(0, weight.shape[1] ** -0.5)
            weight.copy_(weight.bfloat16())  # the classifier keeps it in the type of its other weights
        export(model, ours, "merged")
        export(model, classifier, "classifier")
    return ours, classifier


def head(size: int) -> list[float]:
    """Weights of a linear head, for two models that are to start with the same one."""
    draw = random.Random("benchmarks/head")
    return [draw.gauss(0, size**-0.5) for _ in range(size)]


def response_pool(pairs: Sequence[TokenPair], prompts: int, responses: int) -> list[dict]:
    """Prompts nearest to POOL_PROMPT tokens, each with equally many responses, drawn from all pairs' responses: the
    lengths of real ones. Whether they answer the prompt does not matter to how long scoring takes."""
    draw = random.Random("benchmarks/pool")
    nearest = sorted(pairs, key=lambda pair: abs(len(pair["prompt"]) - POOL_PROMPT))[:prompts]
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    return [{"prompt": pair["prompt"], "responses": draw.sample(texts, responses)} for pair in nearest]


def _plain(pair: Pair) -> TokenPair:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _mean_tokens(pairs: Sequence[TokenPair]) -> str:
    mean = {side: sum(len(p[side]) for p in pairs) / len(pairs) for side in ("prompt", "chosen", "rejected")}
    return f"{mean['prompt']:.0f} + {mean['chosen']:.0f} and {mean['rejected']:.0f} tokens on average"


def _there(policy: str) -> Path:
    folder = Path(policy)
    return folder if folder.is_absolute() else ROOT / policy
