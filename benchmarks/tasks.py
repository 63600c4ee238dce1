"""What both sides of each row are given. Sizes are such that all rows take some 25 minutes on two CPU cores."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import inputs
from benchmarks.runner import Task
from benchmarks.workers import ROOT
from core.config import Config, Lora
from core.config.base import native_dtype
from core.config.load import load
from core.data.chat import ChatTokenizer
from core.data.rows import PromptRow
from core.files import read_json, write_table

WORK = ROOT / "runs" / "bench"
"""Models, tables and logs of the rows; can be deleted."""
CONFIG = "benchmarks/ppo.yaml"
BATCH = 8
"""Pairs per optimiser step of the rows on training."""
POOL_PROMPTS, POOL_RESPONSES = 2, 64
BEST_OF_N = (1000, 405)
"""Prompts and samples of the GRM authors' experiment."""
LORA = Lora(rank=32, alpha=64, targets=("q_proj", "k_proj", "v_proj", "o_proj"))


def attention() -> str:
    """Of both sides: the faster kernel for short texts on a CPU, and on a GPU."""
    import torch

    return "sdpa" if torch.cuda.is_available() else "eager"


def reward_training(lora: Lora | None, runs: int) -> Task:
    """The same batches, head and learning rate; two optimiser steps a run.

    With sdpa, which is transformers' default: with the eager kernel TRL took 18.6 GiB, most of it attention weights of
    padded rows.
    """
    chat, steps = inputs.tokenizer(), 2
    pairs, origin = inputs.natural_pairs(chat, BATCH * steps * runs)
    job = {
        "model": str(ROOT / inputs.POLICY), "dtype": native_dtype(), "attention": "sdpa", "batch": BATCH,
        "batches": [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)], "steps_per_run": steps,
        "lora": lora and {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}, "lr": 1e-5,
        "head": inputs.head(_hidden_size()), "pad_id": chat.pad_id, "variant": {"head": "linear"},
    }  # fmt: skip
    return Task(job, job, f"{origin}, {BATCH} pairs a step")


def regulariser(runs: int) -> Task:
    """Our two losses on the same batches: GRM `sft` as ours, Bradley-Terry as theirs."""
    task = reward_training(None, runs)
    ours = task.ours | {"head": None, "variant": {"text_regulariser": "sft", "alpha": 0.01, "head": "mlp"}}
    theirs = task.theirs | {"head": None, "variant": {"head": "mlp"}}
    return Task(ours, theirs, task.inputs)


def ppo(runs: int, changes: Sequence[str] = (), work: Path = WORK) -> Task:
    """Iterations of the sizes of benchmarks/ppo.yaml, all on the same prompts.

    Args:
        changes: overrides of that configuration.
        work: folder for models, tables and results.
    """
    import torch

    cfg = load([CONFIG], changes)
    overrides = [
        *changes, f"run.dir={work}", "run.name=ppo", f"ppo.steps={runs + 1}", f"ppo.checkpoint_every={runs + 1}",
        f"ppo.save_every={runs + 1}",
    ]  # fmt: skip
    if torch.cuda.is_available():  # as many GPUs as the peer uses
        overrides += ["engine.processes=1", "ppo.engine.processes=1", "policy.attention=sdpa"]
    chat = inputs.tokenizer(cfg.policy.path)
    chats = inputs.prompts(chat, cfg.ppo.prompts_per_step, most_tokens=cfg.data.max_prompt_tokens)
    reward_model, classifier = inputs.reward_model(work / "models", cfg.policy.path)
    stage = work / "rm"
    stage.mkdir(parents=True, exist_ok=True)
    for name in cfg.ppo.members:
        if not (stage / name).exists():
            (stage / name).symlink_to(reward_model, target_is_directory=True)
    rows = [
        {"prompt_id": f"{i:016x}", "prompt": chat_, "num_tokens": 0, "split": "rl_train", "order": i / len(chats)}
        for i, chat_ in enumerate(chats)
    ]
    (work / "prompts").mkdir(exist_ok=True)
    write_table(work / "prompts" / "prompts.parquet", rows, PromptRow)
    ours = {
        "config": CONFIG, "overrides": overrides, "prompts_folder": str(work / "prompts"), "reward_models": str(stage),
        "out": str(_empty(work / "ppo")),
    }  # fmt: skip
    lengths = [len(chat.prompt_ids(chat_)) for chat_ in chats]
    return Task(
        ours, _trl_ppo(cfg, chat, chats, classifier),
        f"{len(chats)} prompts of {sum(lengths) / len(lengths):.0f} tokens on average, the same in every iteration; "
        f"responses of up to {cfg.generation.max_new_tokens} tokens",
    )  # fmt: skip


def _trl_ppo(cfg: Config, chat: ChatTokenizer, chats: list, classifier: Path) -> dict:
    lora = cfg.ppo.lora
    assert lora, "this row compares PPO with adapters"
    return {
        "policy": str(ROOT / cfg.policy.path), "settings": _old_names(ROOT / cfg.policy.path),
        "classifier": str(classifier), "dtype": cfg.engine_of("ppo").dtype,
        "attention": cfg.policy.attention if attention() == "eager" else "sdpa",
        "prompts": [chat.prompt_ids(chat_) for chat_ in chats], "pad_id": chat.pad_id, "eot_id": chat.eot_id,
        "lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), "top_layers": lora.top_layers},
        "critic_trainable_layers": cfg.ppo.critic_trainable_layers, "rollouts": cfg.ppo.rollouts,
        "minibatches": cfg.ppo.minibatches, "epochs": cfg.ppo.epochs, "forward_batch": cfg.ppo.rollouts,
        "max_new_tokens": cfg.generation.max_new_tokens, "temperature": cfg.generation.temperature,
        "kl_coef": cfg.ppo.kl.coef, "gamma": cfg.ppo.gamma, "lam": cfg.ppo.lam, "lr": cfg.ppo.actor.lr,
    }  # fmt: skip


def sampling(prompts: int, n: int, runs: int) -> Task:
    cfg, chat = load([CONFIG]), inputs.tokenizer()
    chats = inputs.prompts(chat, max(prompts, 8), most_tokens=cfg.data.max_prompt_tokens)
    asked = [chat.prompt_ids(chat_) for chat_ in chats[:prompts]]
    job = {
        "model": str(ROOT / inputs.POLICY), "dtype": cfg.generation.vllm.dtype, "attention": attention(),
        "prompts": asked, "n": n, "max_new_tokens": 64, "max_model_len": 256,
        "stop_ids": chat.stop_ids, "pad_id": chat.pad_id,
        "generation": cfg.generation.model_dump(mode="json"), "greedy": 8, "compared": 8,
    }  # fmt: skip
    tokens = sum(map(len, asked)) / prompts
    what = f"{prompts} prompts, a response to each" if n == 1 else f"{n} responses to one prompt"
    return Task(job, job, f"{what}, of at most 64 tokens; prompts have {tokens:.0f} tokens on average")


def scoring(runs: int) -> Task:
    chat = inputs.tokenizer()
    pairs, origin = inputs.natural_pairs(chat, POOL_PROMPTS * POOL_RESPONSES)
    reward_model, classifier = inputs.reward_model(WORK / "models")
    pool = inputs.response_pool(pairs, POOL_PROMPTS, POOL_RESPONSES)
    job = {
        "reward_model": str(reward_model), "classifier": str(classifier), "dtype": native_dtype(),
        "attention": attention(), "pool": pool, "batch": 16,
    }  # fmt: skip
    tokens = ", ".join(str(len(group["prompt"])) for group in pool)
    return Task(
        job, job, f"{POOL_PROMPTS} prompts of {tokens} tokens with {POOL_RESPONSES} responses each; from {origin}"
    )


def best_of_n(runs: int) -> Task:
    prompts, samples = BEST_OF_N
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(prompts, samples))
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / "scores.npy"
    np.save(file, np.stack([gold + rng.normal(size=gold.shape), gold]))
    ns = np.unique(np.linspace(1, samples, 8).round().astype(int)).tolist()
    job = {"scores": str(file), "ns": ns}
    return Task(
        job, job,
        f"{prompts} prompts x {samples} random scores; ours takes every n from 1 to {samples}, theirs n = "
        f"{', '.join(map(str, ns))}, a pass each: what is compared is n per second",
    )  # fmt: skip


def _old_names(model: Path) -> dict:
    """Settings under the names of transformers 4, which would silently take its default for the rotary base."""
    rope = read_json(model / "config.json").get("rope_parameters") or {}
    return {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}


def _hidden_size() -> int:
    return read_json(ROOT / inputs.POLICY / "config.json")["hidden_size"]


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
