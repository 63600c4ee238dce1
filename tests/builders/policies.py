"""Tiny policies of the families that people use, as folders with weights, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
HEADS = {"head_dim": 32}
"""32 is the smallest head that vLLM's kernels for CPUs take."""
WINDOW = {"sliding_window": 16}
"""Shorter than the conversations of the test."""
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED | WINDOW),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | HEADS),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED | HEADS),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GROUPED | HEADS | WINDOW | {"query_pre_attn_scalar": 32}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | HEADS | WINDOW | {"query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 192, "word_embed_proj_dim": 128}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", GROUPED),
}
"""Configuration, class and further settings."""


def tiny_policy(family: str, tokenizer: Path, folder: Path, *, layers: int = 2) -> Path:
    """Write a model of this family with random weights and the tokenizer of another folder; returns `folder`."""
    kind, network, more = FAMILIES[family]
    hf = AutoTokenizer.from_pretrained(tokenizer)
    ids = {"pad_token_id": hf.unk_token_id, "bos_token_id": hf.bos_token_id, "eos_token_id": hf.eos_token_id}
    settings = {**SIZES, "num_hidden_layers": layers, "vocab_size": len(hf), "initializer_range": 0.1, **ids, **more}
    config_class = getattr(transformers, kind)
    if family == "gemma3":
        text = settings | FAMILIES["gemma3_text"][2]
        config = config_class(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=3,
                              boi_token_index=4, eoi_token_index=5, **ids)  # fmt: skip
    else:
        known = set(config_class().to_dict()) | set(config_class.attribute_map)
        config = config_class(**{k: v for k, v in settings.items() if k in known})
    torch.manual_seed(7)
    getattr(transformers, network)(config).save_pretrained(folder)
    hf.save_pretrained(folder)
    return folder
