"""Special tokens of a tokenizer: which text must never turn into, which may fill rows, which end responses."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from core.config import Model
from core.files import read_json

GENERATION = "generation_config.json"
SPARE = (
    re.compile(r"^\W*(right_|finetune_right_)?pad(ding|_token|_id)?\W*$", re.IGNORECASE),
    re.compile(r"reserved|unused", re.IGNORECASE),
    re.compile(r"(?<![a-z])pad", re.IGNORECASE),
)
"""Names of special tokens that can be used for padding, the best first: made for it, reserved, for images and such."""


def added_tokens(hf: Any) -> dict[int, Any]:
    """Id -> token (with `content` and `special`) of all tokens that are found in a text before it is split."""
    return hf.added_tokens_decoder


def control_tokens(hf: Any, ends: Collection[int], rendered: str) -> set[str]:
    """Special tokens, those that end responses, and those that the template writes around turns.

    Other added tokens, such as the marks of a model's thoughts or several line breaks at once, are part of what people
    and models write.

    Args:
        ends: ids of the tokens that end responses.
        rendered: a prompt, as the template renders it.
    """
    special = {t.content for i, t in added_tokens(hf).items() if t.special or i in ends}
    around = {
        t.content for t in added_tokens(hf).values() if t.content in rendered and re.search(r"[^\w\s]", t.content)
    }
    return {token for token in {*special, *around, *hf.all_special_tokens} if token.strip()}


def spare_token(hf: Any, taken: Collection[int | None]) -> str | None:
    """A special token for padding that is not among `taken`; None where there is none."""
    if hf.unk_token_id is not None and hf.unk_token_id not in taken:
        return hf.unk_token
    spare = [t.content for i, t in sorted(added_tokens(hf).items()) if t.special and i not in taken]
    return next((token for kind in SPARE for token in spare if kind.search(token)), None)


def end_ids(generation_settings: Mapping[str, Any]) -> list[int]:
    """The end tokens of a generation_config.json, which holds one, a list, or none."""
    ends = generation_settings.get("eos_token_id")
    return [] if ends is None else list(ends) if isinstance(ends, Iterable) else [ends]


def read_generation_settings(model: Model) -> dict[str, Any]:
    """The content of the model's generation_config.json; empty where it has none."""
    from transformers.utils import cached_file

    file = cached_file(
        model.path, GENERATION, revision=model.revision,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return read_json(Path(file)) if file else {}
