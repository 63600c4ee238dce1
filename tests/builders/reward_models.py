"""Tiny reward models of this project's own kind."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from core.config import Model
from core.data.chat import ChatTokenizer
from rm.model import RewardModel
from tests.builders.checkpoints import tiny_config


def tiny_reward_model(tokenizer_path: Path, head: str, **settings) -> RewardModel:
    """A reward model of two layers with random weights, in float32; `settings` are those of `LlamaConfig`."""
    torch.manual_seed(4)
    chat = ChatTokenizer(Model(path=str(tokenizer_path)))
    lm = LlamaForCausalLM(tiny_config(chat.hf, **settings))
    # as `tests.builders.checkpoints.read` does, so that rewards can be equal to the bit
    lm.set_attn_implementation("eager")
    return RewardModel(lm, head, chat, mean=0.25, std=2.0).eval()


def nudged(model: RewardModel, seed: int, size: float = 0.01) -> RewardModel:
    """A copy whose weights are some hundredths away, as another fine-tuning would leave it."""
    moved = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (*moved.lm.parameters(), *moved.head.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=size)
    return moved
