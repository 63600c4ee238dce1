"""A language model of two layers, and an optimiser under which rounding decides nothing."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core import config

# A large eps: Adam divides by it where a gradient is nearly 0, and rounding there would decide the sign of a step.
OPTIM = config.Optim(lr=1e-2, schedule="constant", warmup=0.0, max_grad_norm=1.0, eps=1e-3)


def tiny_lm(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip
