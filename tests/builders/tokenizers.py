"""Tokenizers that load at once."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from core.data.templates import named_template


def first_tokens(source: Path, folder: Path, size: int = 2048) -> Path:
    """A copy of a byte-level BPE tokenizer, with its chat template, that knows the first `size` tokens alone.

    It tokenises any text, since all bytes are among them, and loads some thirty times faster than one of 49,152.
    """
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    return folder


def of_family(source: Path, folder: Path, template: str, special: Sequence[str], **settings: str | None) -> Path:
    """A copy of the tokenizer at `source` with another chat template and special tokens.

    Args:
        template: the name of one of TRL's templates, or the text of one.
        special: further special tokens, which get the next ids.
        settings: of tokenizer_config.json; without bos_token, eos_token or another, the tokenizer has none.
    """
    text = named_template(template) if template.isidentifier() else template
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    size = 1 + max(*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": size + i, "content": token, **flags} for i, token in enumerate(special)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""As Llama 2's: no generation prompt, and white space around answers."""


def spaces_as_text(folder: Path, kind: str, template: str = LLAMA_2) -> Path:
    """A tokenizer that writes spaces as '▁' and puts one before a text, as those made with SentencePiece do.

    Args:
        kind: `bpe` (Llama 2, Mistral, Gemma) or `unigram` (T5, and some multilingual models).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    model, trainer = {
        "bpe": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=300, special_tokens=special)),
        "unigram": (
            models.Unigram(), trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
        ),
    }[kind]  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    alphabet = " ".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?![]/<>|_")
    tokenizer.train_from_iterator(
        [alphabet, *["Yes, a cat is an animal. Is a fruit an animal? [INST] [/INST]"] * 4], trainer
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
