"""Preference pairs with a planted rule, a base that can learn it, and every method of training on them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from core.data.chat import conversation
from rm.model import RewardModel
from tests.builders.checkpoints import tiny_config

GOOD, BAD = ("yes", "right", "gladly", "certainly"), ("no", "never", "wrong", "hardly")
FILLER = ("the", "and", "that", "with", "from", "some", "when", "then", "over", "more")

METHODS: dict[str, dict] = {
    "bt, linear head": {"head": "linear", "micro_batch": 4},
    "bt, mlp head": {},
    "margin": {"margin": 1.0},
    "label smoothing": {"label_smoothing": 0.1},
    "rDPO noise": {"noise_rate": 0.1},
    "positive": {"positive": 0.1},
    "center": {"center": 0.01},
    "head dropout": {"head_dropout": 0.1},
    "grm sft": {"text_regulariser": "sft", "micro_batch": 4},
    "grm sft, every turn": {"text_regulariser": "sft", "regularise": "every_turn"},
    "grm sft, after the first turn": {"text_regulariser": "sft", "regularise": "after_first_turn"},
    "grm sft_plain": {"text_regulariser": "sft_plain"},
    "grm dpo_noref": {"text_regulariser": "dpo_noref"},
    "grm dpo": {"text_regulariser": "dpo"},
    "inform": {"head": "inform", "micro_batch": 4},
    "odin": {"head": "odin", "micro_batch": 4},
    "odin, grm sft": {"head": "odin", "text_regulariser": "sft", "head_dropout": 0.1},
    "some layers": {"num_layers": 1, "trainable_layers": 1},
    "lora": {"lora": True},
    "bt, own epochs and rate": {
        "head": "linear",
        "micro_batch": 4,
        "epochs": 2,
        "lr": 0.01,
        "common_epochs": 5,
        "common_lr": 0.3,
    },
    "lora, saved as an adapter": {"lora": True, "save": "adapter", "text_regulariser": "sft"},
}
"""Name -> options of the variant, and those of `settings`."""


def write_base(tokenizer_path: Path, folder: Path) -> Path:
    """A model of two layers whose attention is nearly uniform at first, so that a few steps are enough."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config(tokenizer, hidden_size=64, initializer_range=0.02)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(
    base, *, lora: bool = False, save: str = "merged", micro_batch: int = 8, common_epochs: int = 2,
    common_lr: float = 0.01, **variant,
) -> list[str]:  # fmt: skip
    """Overrides that train one variant, `it`, on `base` under ZeRO-3, with whole weights only inside their layers.

    Batches have 16 pairs: one pass on each of two ranks, or two passes where `micro_batch` is 4.
    """
    adapters = "{rank: 8, alpha: 16, dropout: 0.05}" if lora else "null"
    return [
        f"rm.base.path={base}", "rm.base.attention=eager", f"rm.save={save}", "rm.global_batch=16",
        f"rm.micro_batch={micro_batch}", f"rm.epochs={common_epochs}", f"rm.optim.lr={common_lr}",
        "rm.optim.warmup=0.1", f"rm.lora={adapters}", f"rm.variants={{it: {json.dumps(variant)}}}", "ppo.proxy=it",
        "engine.dtype=float32", "engine.overrides={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ]  # fmt: skip


def pair_rows(n: int, seed: int, *, noise: float = 0.0, longer: float = 0.5) -> list[dict]:
    """Rows of pairs.parquet: the chosen answer has a word of `GOOD` where the other has one of `BAD`.

    Every second prompt has two turns.

    Args:
        noise: share of the labels that are flipped.
        longer: share of the pairs whose chosen answer is the longer one.
    """
    rng, rows = random.Random(seed), []
    for i in range(n):
        short, long = (rng.sample(FILLER, k) for k in (rng.randint(1, 3), rng.randint(6, 10)))
        if rng.random() < longer:
            short, long = long, short
        chosen, rejected = (
            " ".join([*words[:1], rng.choice(kind), *words[1:]]) for words, kind in ((short, GOOD), (long, BAD))
        )
        flipped = i < noise * n
        if flipped:
            chosen, rejected = rejected, chosen
        earlier = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Ask."}] if i % 2 else []
        rows.append(
            {
                "prompt_id": f"{seed}-{i}", "pair_id": f"{seed}-{i}", "weight": 1.0, "flipped": flipped,
                "prompt": [*earlier, {"role": "user", "content": f"Question {rng.randint(0, 99)}?"}],
                "chosen": chosen, "rejected": rejected, "response": chosen, "margin": 1.0,
                "gold_chosen": None, "gold_rejected": None,
            }
        )  # fmt: skip
    return rows


def accuracy(model: RewardModel, rows: list[dict]) -> float:
    chosen, rejected = (
        model.score([conversation(r["prompt"], r[side]) for r in rows]) for side in ("chosen", "rejected")
    )
    return float((chosen > rejected).float().mean())
