"""What a drill runs: a policy of two layers with random weights, and a configuration in which all stages are small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

BASE = Path("models", "SmolLM2-135M-Instruct")
"""Whose tokenizer and chat template the policy has."""
PROMPTS = Path("data", "prompts.jsonl")
NUM_PROMPTS = 200
NAME = "drill"
PROXY = "grm"


def prepare(folder: Path) -> Path:
    """Write policy, prompts and configuration into a folder; returns the configuration's file."""
    policy, prompts, config = folder / "policy", folder / "prompts.jsonl", folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    if not (policy / "model.safetensors").is_file():
        tiny_llama(first_tokens(BASE, policy), policy)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts.write_text("\n".join(sorted(lines, key=len)[:NUM_PROMPTS]) + "\n", encoding="utf-8")
    config.write_text(yaml.safe_dump(settings(policy.resolve(), prompts.resolve()), sort_keys=False), encoding="utf-8")
    return config


def settings(policy: Path, prompts: Path) -> dict[str, Any]:
    """As small as the stages allow, yet with several shards, reward models, steps of PPO and checkpoints to lose."""
    model = {"path": str(policy), "attention": "eager"}
    lora = {"rank": 4, "alpha": 8, "top_layers": 1}
    return {
        "run": {"name": NAME},
        "policy": model,
        "data": {"prompts": str(prompts), "max_prompt_tokens": 160},
        "generation": {"max_new_tokens": 8, "vllm": {"max_model_len": 192, "max_num_seqs": 16, "dtype": "float32"}},
        "preferences": {"max_train_pairs": 16, "max_val_pairs": 8, "max_calibration_prompts": 4, "shard_prompts": 8},
        "rm": {
            "base": model, "lora": lora, "global_batch": 8, "micro_batch": 4, "max_tokens": 192,
            "optim": {"lr": 1e-3},
            "variants": {PROXY: {"text_regulariser": "sft", "alpha": 0.1}, "bt": {"trainable_layers": 1}},
        },
        "bon": {"samples": 4, "prompts": 6, "shard_prompts": 2},
        "ppo": {
            "proxy": PROXY, "lora": lora, "steps": 3, "rollouts": 8, "micro_batch": 4, "minibatches": 1,
            "critic_trainable_layers": 1, "checkpoint_every": 1, "save_every": 1, "actor": {"lr": 1e-3},
            "server_timeout": 20,
        },
        "engine": {"processes": 1, "dtype": "float32"},
        "eval": {"prompts": 6, "bootstrap": 100},
        "study": {"variants": [PROXY, "bt"], "seeds": 1, "ppo_variants": ["bt"], "kl_coefs": [0.0]},
    }  # fmt: skip


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


def tiny_llama(tokenizer: Path, folder: Path) -> None:
    """Write a language model of two layers that has the tokenizer in a folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hf = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(7)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(hf), hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
            pad_token_id=hf.unk_token_id, bos_token_id=hf.bos_token_id, eos_token_id=hf.eos_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    hf.save_pretrained(folder)
