"""Tokenizers with templates as published models have them: what follows the end of turn, and who writes BOS."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

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
