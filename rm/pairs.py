"""Preference pairs as token ids, and their order in training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from core.batching import in_epochs
from core.config import RewardTraining, RewardVariant
from core.data.chat import ChatTokenizer, Message
from core.data.rows import PairRow, ResponseRow
from core.data.streams import stream_seed
from core.errors import ArtefactError, DataError
from rm.reading import sampled_ids

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a labelled pair: one prompt, two responses."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    turns: tuple[tuple[int, int], ...] = ()
    """Spans [start, stop) of the prompt that the text regulariser reads too."""
    margin: float = 0.0
    """By how much the chosen reward should exceed the other."""
    reference: tuple[float, float] = (0.0, 0.0)
    """Log-probs of chosen and rejected by the untrained base, in nats; for `dpo` only."""
    prompt_id: str = ""
    """For messages."""

    @property
    def length(self) -> int:
        """Tokens of the longer conversation."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def row(self) -> int:
        """Tokens of a row that holds the prompt once and both responses."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def tokenise(
    rows: list[PairRow], tokenizer: ChatTokenizer, rm: RewardTraining, variant: RewardVariant
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs within `rm.max_tokens`, in the order of `rows`, and how many were dropped, truncated, and had the text of
    their system turn put before the first user turn, because the chat template has no system turn.

    Responses that the policy sampled keep their tokens, where its tokenizer is this one.

    Raises:
        DataError: the variant has a margin and a row has no rating gap; it regularises earlier turns and the chat
            template does not write them as they were generated.
    """
    pairs, counts = [], {"dropped": 0, "truncated": 0, "system_moved": 0}
    for row in rows:
        counts["system_moved"] += tokenizer.moves_system(row["prompt"])
        pair: Pair | None = _pair(row, row["prompt"], tokenizer, variant)
        if pair is not None and pair.length > rm.max_tokens:
            pair = _shortened(pair, row, tokenizer, rm, variant)
            counts["dropped" if pair is None else "truncated"] += 1
        if pair is not None:
            pairs.append(pair)
    return pairs, counts


def _pair(row: PairRow, prompt: list[Message], tokenizer: ChatTokenizer, variant: RewardVariant) -> Pair:
    """The pair of a row whose prompt may have been shortened."""
    spans = _regularised(prompt, tokenizer, variant.regularise)
    return Pair(
        tokenizer.prompt_ids(prompt),
        _response_ids(row, "chosen", tokenizer),
        _response_ids(row, "rejected", tokenizer),
        tuple(spans),
        variant.margin * _gap(row) if variant.margin else 0.0,
        prompt_id=row.get("prompt_id", ""),
    )


def _shortened(
    pair: Pair, row: PairRow, tokenizer: ChatTokenizer, rm: RewardTraining, variant: RewardVariant
) -> Pair | None:
    """A pair above `rm.max_tokens`, cut down to it as `rm.overlong` says; None where it is dropped."""
    if rm.overlong == "truncate":
        prompt = row["prompt"]
        system = [m for m in prompt[:1] if m["role"] == "system"]
        for first in range(len(system) + 2, len(prompt), 2):  # a turn of the user, and the assistant's answer
            shorter = _pair(row, [*system, *prompt[first:]], tokenizer, variant)
            if shorter.length <= rm.max_tokens:
                return shorter
    if rm.overlong == "truncate_right":
        room = max(rm.max_tokens - len(pair.prompt), 0)
        cut = replace(pair, chosen=pair.chosen[:room], rejected=pair.rejected[:room])
        return cut if cut.chosen != cut.rejected else None  # two equal texts say nothing about which is better
    return None


def as_response(row: PairRow, side: Side) -> ResponseRow:
    """One side of a pair as a row to be scored."""
    ids = row.get("chosen_ids") if side == "chosen" else row.get("rejected_ids")
    text = row["chosen"] if side == "chosen" else row["rejected"]
    return {"prompt": row["prompt"], "response": text, "token_ids": ids, "tokenizer": row.get("tokenizer")}


def _response_ids(row: PairRow, side: Side, tokenizer: ChatTokenizer) -> list[int]:
    response = as_response(row, side)
    return sampled_ids(response, tokenizer) or tokenizer.response_ids(response["response"])


def batch_plan(pairs: list[Pair], rm: RewardTraining, variant: RewardVariant, seed: int) -> list[list[int]]:
    """Indices into `pairs` of every global batch of every epoch.

    Each epoch has an order of its own, and leaves out the incomplete batch at its end. Variants with the same
    `variant.seed` see the same batches.

    Args:
        seed: `run.seed`.

    Raises:
        ArtefactError: fewer pairs than one global batch.
    """
    size = rm.global_batch
    if len(pairs) < size:
        raise ArtefactError(f"{len(pairs)} training pairs are fewer than rm.global_batch {size}")
    epochs = range(rm.epochs_of(variant))
    seeds = [stream_seed(seed, "rm", "order", epoch, *seed_name(variant)) for epoch in epochs]
    return in_epochs(len(pairs), size, seeds)


def seed_name(variant: RewardVariant) -> tuple[int, ...]:
    """What the variant's seed adds to the names of its random streams; nothing for seed 0."""
    return (variant.seed,) if variant.seed else ()


def _regularised(prompt: list[Message], tokenizer: ChatTokenizer, which: str) -> list[tuple[int, int]]:
    """Spans [start, stop) of the prompt's tokens that the text regulariser reads."""
    if which == "every_turn":
        return tokenizer.assistant_spans(prompt)
    first = next(i for i, message in enumerate(prompt) if message["role"] == "user") + 1
    if which == "last" or first == len(prompt):
        return []
    ids, start = tokenizer.prompt_ids(prompt), tokenizer.prompt_ids(prompt[:first])
    if ids[: len(start)] != start:
        raise DataError(
            "rm.variants.*.regularise after_first_turn: this chat template does not write the first turn of a chat of "
            "several turns as it writes it alone. Use last or every_turn"
        )
    return [(len(start), len(ids))]


def _gap(row: PairRow) -> float:
    if (margin := row.get("margin")) is not None:
        return float(margin)
    better, worse = row.get("gold_chosen"), row.get("gold_rejected")
    if better is not None and worse is not None:
        return abs(better - worse)
    raise DataError(f"pair of prompt {row['prompt_id']} has no rating gap: set rm.variants.*.margin to 0")
