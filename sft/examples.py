"""Demonstrations as token ids with labels, selected and divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.config import Sft
from core.data.chat import ChatTokenizer, Message, conversation, with_system
from core.data.demonstrations import Demonstration, read_demonstrations
from core.data.rows import DemonstrationRow
from core.data.splits import begins_with, opening, prompt_id
from core.data.streams import unit_interval
from core.data.tables import Malformed
from core.errors import ArtefactError
from core.files import write_jsonl, write_table

NO_LOSS = -100
"""Label of a token that the loss is not on, as everywhere in transformers."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a demonstration."""

    ids: list[int]
    """Of the prompt and the response, its end of turn included."""
    labels: list[int]
    """The id where the loss is on the token, else `NO_LOSS`."""


class Examples(NamedTuple):
    train: list[Example]
    val: list[Example]
    dropped: dict[str, int]
    """Demonstrations that are not used, by reason."""
    malformed: Malformed


def load_examples(
    sft: Sft, tokenizer: ChatTokenizer, *, system: str | None, held_out: set[str], positions: int, seed: int,
    out: Path | None,
) -> Examples:  # fmt: skip
    """The demonstrations of `sft.data`.

    Whether one is trained on or held out follows from its first user turn, because the prompt of one may continue the
    conversation of another.

    Args:
        system: put before every prompt that has no system message: `data.system`, as it is put before the prompts that
            the policy will answer.
        held_out: normalised prompts that nothing is trained on (`core.data.splits.held_out_prompts`).
        positions: how many tokens the model takes.
        seed: `run.seed`.
        out: folder for `demonstrations.parquet` and `rejected.jsonl`; None to write nothing.

    Raises:
        ArtefactError: too many malformed rows, or fewer demonstrations than a batch.
    """
    malformed, dropped = Malformed(), Counter[str]()
    kept: dict[str, tuple[DemonstrationRow, Example]] = {}
    for demonstration in read_demonstrations(sft, malformed):
        prompt = with_system(demonstration["prompt"], system)
        identity = prompt_id(conversation(prompt, demonstration["response"]))
        if identity in kept:
            dropped["duplicate"] += 1
        elif begins_with(prompt, held_out):
            dropped["prompt of the splits eval or calibration"] += 1
        else:
            made = example(prompt, demonstration["response"], tokenizer, sft.loss_on)
            if len(made.ids) > min(sft.max_tokens, positions):
                dropped["longer than sft.max_tokens, or than the model takes"] += 1
            else:
                kept[identity] = _row(demonstration, prompt, made, sft.val_share), made
    if out is not None:  # before the share is checked: whoever reads of it wants to see them
        write_jsonl(out / "rejected.jsonl", malformed.rows)
    _check_share(sft, malformed)
    order = sorted(kept, key=lambda identity: unit_interval(identity, salt=f"sft/{seed}"))[: sft.max_demonstrations]
    chosen = [kept[identity] for identity in order]
    if out is not None:
        write_table(out / "demonstrations.parquet", [row for row, _ in chosen], DemonstrationRow)
    train, val = ([made for row, made in chosen if row["split"] == split] for split in ("train", "val"))
    if len(train) < sft.global_batch:
        why = "; ".join(f"{n} x {reason}" for reason, n in dropped.items())
        raise ArtefactError(
            f"{sft.data}: {len(train)} demonstrations to train on are fewer than sft.global_batch {sft.global_batch}"
            + (f" (left out: {why})" if why else "")
        )
    return Examples(train, val, dict(dropped), malformed)


def example(
    prompt: Sequence[Message], response: str, tokenizer: ChatTokenizer, loss_on: Literal["every_turn", "last"]
) -> Example:
    """Tokens and labels of one demonstration: those tokens that the policy generates, as it generates them.

    Raises:
        DataError: `every_turn`, and a template that renders earlier turns of the assistant otherwise.
    """
    before, answer = tokenizer.prompt_ids(prompt), tokenizer.response_ids(response)
    labels = [NO_LOSS] * len(before)
    if loss_on == "every_turn":
        for start, stop in tokenizer.assistant_spans(prompt, option="sft.loss_on"):
            labels[start:stop] = before[start:stop]
    return Example(before + answer, labels + answer)


def _row(demonstration: Demonstration, prompt: list[Message], made: Example, val_share: float) -> DemonstrationRow:
    return {
        "prompt_id": prompt_id(prompt),
        "split": "val" if unit_interval(opening(prompt), salt="sft") < val_share else "train",
        "source": demonstration["source"],
        "prompt": prompt,
        "response": demonstration["response"],
        "n_tokens": len(made.ids),
    }


def _check_share(sft: Sft, malformed: Malformed) -> None:
    wrong, read = malformed.counts.total(), malformed.read
    if not read:
        why = [*malformed.lines(), *(f"{n} x {done}" for done, n in malformed.changed.items())]
        raise ArtefactError(f"sft.data {sft.data}: no demonstration; " + ("; ".join(why) or "no rows"))
    if wrong > sft.max_rejected_share * (read + wrong):
        raise ArtefactError(
            f"sft.data {sft.data}: {wrong} of {read + wrong} rows are malformed, more than sft.max_rejected_share "
            f"{sft.max_rejected_share:g}: " + "; ".join(malformed.lines())
        )


def as_columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The columns that TRL's collator reads."""
    return {"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]}
