"""Tokenizers that load at once, and templates as published models have them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.data.templates import named_template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}\n"
)


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


def chatml(source: Path, folder: Path) -> Path:
    """ChatML without BOS, as Qwen's: a newline follows the end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def gemma(source: Path, folder: Path) -> Path:
    """Gemma's template; template and tokenizer both write BOS, as with Gemma and Llama-3."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens(
        {"bos_token": "<bos>", "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    )
    tokenizer.chat_template = GEMMA
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def rewardbench(folder: Path, chats: list) -> Tensor:
    """Rewards [n] of a classifier's folder as RewardBench's own loop computes them.

    Written from its `RewardBenchPipeline`: the template's whole rendering is tokenised like any text, the first of two
    BOS is masked, and the model's logits are the rewards.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if tokenizer.bos_token is not None:
        mask[(ids[:, 0] == tokenizer.bos_token_id) & (ids[:, 1] == tokenizer.bos_token_id), 0] = 0
    return model.eval()(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
