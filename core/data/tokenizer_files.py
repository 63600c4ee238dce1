"""Files of a tokenizer and of how its model generates, as transformers of versions 4 and 5 read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.data.chat import ChatTokenizer
from core.data.special_tokens import GENERATION, end_ids
from core.errors import DataError
from core.files import read_json, write_json

CHANGED = ("eos_token_id", "pad_token_id")
"""Settings of the base in generation_config.json that are replaced by what the tokenizer does."""


def save_tokenizer(folder: Path, tokenizer: ChatTokenizer) -> None:
    """Write the tokenizer with its template, and generation_config.json with every token that ends a response."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        settings = {"pad_token_id": tokenizer.pad_id, "eos_token_id": _ends(tokenizer)}
    except DataError:  # of someone else's reward model, which generates nothing
        settings = {}
    tokenizer.hf.save_pretrained(folder)
    _write_old_names(folder / "tokenizer_config.json", tokenizer.hf)
    if settings:
        if tokenizer.hf.bos_token_id is not None:
            settings["bos_token_id"] = tokenizer.hf.bos_token_id
        write_json(folder / GENERATION, settings | tokenizer.generation_settings | {k: settings[k] for k in CHANGED})


def _ends(tokenizer: ChatTokenizer) -> int | list[int]:
    """The end tokens of the base in its order, then the others; a single one as a number."""
    ends = list(dict.fromkeys([*end_ids(tokenizer.generation_settings), *tokenizer.stop_ids]))
    return ends if len(ends) > 1 else ends[0]


def _write_old_names(file: Path, hf: Any) -> None:
    """Put what only version 5 of transformers knows under the names of version 4, which version 5 reads too."""
    settings = read_json(file)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    if isinstance(hf.chat_template, str):  # before version 4.48 it was read from here only
        settings["chat_template"] = hf.chat_template
    settings["model_input_names"] = hf.model_input_names
    for private in ("is_local", "local_files_only", "backend"):
        settings.pop(private, None)
    write_json(file, settings)
