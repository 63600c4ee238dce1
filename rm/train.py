"""Stage `rm`: train every variant of the reward model on the same pairs, in the same order, and measure it.

The trainer is our own loop on the DeepSpeed engine that PPO uses, not trl.RewardTrainer: the regulariser needs
log-probs of chosen responses only, two models of one comparison must see identical batches, and
accelerate with DeepSpeed reports one process on every CPU rank.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipelines import engine
from pipelines.artefacts import ArtefactError, read_json, read_table, write_json, write_table
from pipelines.config import Config, RewardVariant
from pipelines.data import ChatTokenizer, stream_seed
from pipelines.models import add_lora, load_causal_lm, pad_right, train_top_layers
from rm.evaluate import accuracy_with_interval, pair_accuracy
from rm.losses import bradley_terry, center_penalty, text_regulariser, total_loss
from rm.model import RewardModel, save_reward_model
from rm.score import score


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a labelled pair; the prompt is common."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    engine.init_distributed()
    rows = read_table(inputs["preferences"] / "pairs.parquet")
    calibration = read_table(inputs["preferences"] / "calibration.parquet")
    train = [row for row in rows if row["split"] == "rm_train"]
    val = [row for row in rows if row["split"] == "rm_val"]
    metrics = {}
    for name, variant in cfg.rm.variants.items():
        done = out / name / "metrics.json"
        if not done.is_file():  # a killed stage goes on with the first unfinished variant
            train_variant(cfg, name, variant, train, val, calibration, out / name)
        torch.distributed.barrier()
        metrics[name] = read_json(done)
    longest = [len(r["chosen"].split()) - len(r["rejected"].split()) for r in val if not r["flipped"]]
    parts = [
        f"{name} {m['accuracy_gold']['mean']:.3f} [{m['accuracy_gold']['lo']:.3f}, {m['accuracy_gold']['hi']:.3f}]"
        for name, m in metrics.items()
    ]
    return {
        "headline": f"held-out accuracy against gold on {len(val)} pairs: " + ", ".join(parts),
        "variants": metrics,
        "longest_answer_accuracy": float(np.mean([(d > 0) + 0.5 * (d == 0) for d in longest])),
    }


def train_variant(
    cfg: Config,
    name: str,
    variant: RewardVariant,
    train: list[dict],
    val: list[dict],
    calibration: list[dict],
    out: Path,
) -> None:
    """Train one reward model and write its folder, `metrics.json` last."""
    started = time.time()
    model, tokenizer = build(cfg, variant)
    pairs, dropped = tokenise(train, tokenizer, cfg.rm.max_tokens)
    batches = batch_plan(pairs, cfg)
    micro = cfg.rm.micro_batch
    trainer = engine.Engine(
        model, cfg.engine, micro_batch=micro, optim=cfg.rm.optim, total_steps=len(batches),
        accumulation=cfg.rm.global_batch // (micro * engine.world_size()),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "train.jsonl").open("w") if engine.rank() == 0 else None
    for step, batch in enumerate(tqdm(batches, desc=f"rm {name}", unit="step", disable=engine.rank() != 0), start=1):
        row = {"step": step, **train_step(trainer, tokenizer, variant, batch, micro), "lr": trainer.lr}
        if log:
            log.write(json.dumps(row) + "\n")
            log.flush()
    found = measure(trainer, model, tokenizer, val, calibration, micro, out)
    save(trainer, model, variant, out)
    if engine.rank() == 0:
        found |= {
            "pairs": len(pairs),
            "dropped": dropped,
            "steps": len(batches),
            "seconds": round(time.time() - started, 1),
        }
        write_json(out / "metrics.json", found)


def build(cfg: Config, variant: RewardVariant) -> tuple[RewardModel, ChatTokenizer]:
    """The untrained model; heads of all variants of one seed start from the same numbers."""
    tokenizer = ChatTokenizer(cfg.rm.base)
    lm = load_causal_lm(cfg.rm.base, dtype=cfg.engine.dtype, num_layers=cfg.rm.num_layers)
    if cfg.rm.lora:
        lm = add_lora(lm, cfg.rm.lora)
    else:
        train_top_layers(lm, cfg.rm.trainable_layers)
    torch.manual_seed(stream_seed(cfg.run.seed, "rm", "head"))
    return RewardModel(lm, variant.head, tokenizer), tokenizer


def tokenise(rows: list[dict], tokenizer: ChatTokenizer, max_tokens: int) -> tuple[list[Pair], int]:
    """Pairs within `max_tokens`, and how many were longer."""
    pairs = [
        Pair(
            tokenizer.prompt_ids(row["prompt"]),
            tokenizer.response_ids(row["chosen"]),
            tokenizer.response_ids(row["rejected"]),
        )
        for row in rows
    ]
    kept = [pair for pair in pairs if pair.length <= max_tokens]
    return kept, len(pairs) - len(kept)


def batch_plan(pairs: list[Pair], cfg: Config) -> list[list[Pair]]:
    """Global batches of every epoch, each epoch in an order of its own; the incomplete last batch is left out."""
    size = cfg.rm.global_batch
    if len(pairs) < size:
        raise ArtefactError(f"{len(pairs)} training pairs are fewer than rm.global_batch {size}")
    batches = []
    for epoch in range(cfg.rm.epochs):
        order = random.Random(stream_seed(cfg.run.seed, "rm", "order", epoch)).sample(pairs, len(pairs))
        batches += [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    return batches


def train_step(
    trainer: engine.Engine, tokenizer: ChatTokenizer, variant: RewardVariant, batch: list[Pair], micro: int
) -> dict:
    """One optimiser step on a global batch; metrics are means over its pairs on all ranks."""
    # Sorted by length and dealt out in turn: little padding, and equal work on every rank.
    mine = sorted(batch, key=lambda pair: pair.length)[engine.rank() :: engine.world_size()]
    sums = dict.fromkeys(("loss", "reward_loss", "regulariser", "accuracy"), 0.0)
    for i in range(0, len(mine), micro):
        parts = pair_losses(trainer, tokenizer, variant, mine[i : i + micro])
        trainer.backward(parts["loss"])
        trainer.step()
        for key in sums:
            sums[key] += float(parts[key].detach()) * len(mine[i : i + micro])
    totals = engine.global_sum(*sums.values())
    return {key: total / len(batch) for key, total in zip(sums, totals, strict=True)} | {"grad_norm": trainer.grad_norm}


def pair_losses(forward, tokenizer: ChatTokenizer, variant: RewardVariant, pairs: list[Pair]) -> dict[str, Tensor]:
    """Loss and its parts on one micro-batch: chosen rows first, then rejected, one forward pass."""
    n = len(pairs)
    ids, mask = pad_right(
        [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], tokenizer.pad_id, engine.device()
    )
    kind = variant.text_regulariser
    predict = None
    if kind != "none" and variant.alpha > 0:
        starts = torch.tensor([len(p.prompt) for p in pairs] * 2, device=ids.device)
        predict = (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]) & mask.bool()
        if kind.startswith("sft"):
            predict[n:] = False  # no logits of rejected responses
    rewards, logps = forward(ids, mask, predict=predict)
    chosen, rejected = rewards[:n], rewards[n:]
    reward_loss = bradley_terry(chosen, rejected, label_smoothing=variant.label_smoothing)
    if variant.center:
        reward_loss = reward_loss + variant.center * center_penalty(chosen, rejected)
    regulariser = torch.zeros((), device=ids.device)
    loss = reward_loss
    if predict is not None:
        regulariser = text_regulariser(kind, logps[:n], logps[n:], beta=variant.beta)
        loss = total_loss(reward_loss, regulariser, variant.alpha)
    return {
        "loss": loss,
        "reward_loss": reward_loss,
        "regulariser": regulariser,
        "accuracy": (chosen > rejected).float().mean(),
    }


def measure(
    trainer: engine.Engine,
    model: RewardModel,
    tokenizer: ChatTokenizer,
    val: list[dict],
    calibration: list[dict],
    micro: int,
    out: Path,
) -> dict:
    """Held-out accuracy, and mean and SD of the reward on samples of the reference policy (set on the model)."""
    answered = lambda row, text: [*row["prompt"], {"role": "assistant", "content": text}]  # noqa: E731
    texts = [answered(r, r[side]) for side in ("chosen", "rejected") for r in val]
    texts += [answered(r, r["response"]) for r in calibration]
    # Each rank scores as many, so that ZeRO-3 sees the same calls: the last ones are repeated to fill up.
    share = -(-len(texts) // engine.world_size())
    filled = texts + texts[-1:] * (share * engine.world_size() - len(texts))
    mine = filled[engine.rank() * share : (engine.rank() + 1) * share]
    scored = score(trainer, tokenizer, mine, batch_rows=4 * micro, device=engine.device()).tolist()
    rewards = engine.gather_rows(scored)[: len(texts)]
    n = len(val)
    chosen, rejected, sampled = np.array(rewards[:n]), np.array(rewards[n : 2 * n]), np.array(rewards[2 * n :])
    model.mean, model.std = float(sampled.mean()), float(sampled.std(ddof=1))
    sign = np.where([r["flipped"] for r in val], -1.0, 1.0)
    if engine.rank() == 0:
        rows = [
            {"prompt_id": r["prompt_id"], "reward_chosen": c, "reward_rejected": j, "flipped": r["flipped"]}
            for r, c, j in zip(val, chosen.tolist(), rejected.tolist(), strict=True)
        ]
        write_table(out / "val.parquet", rows)
    words = [len(r["response"].split()) for r in calibration]
    return {
        "accuracy_gold": accuracy_with_interval(pair_accuracy(sign * chosen, sign * rejected)),
        "accuracy_label": accuracy_with_interval(pair_accuracy(chosen, rejected)),
        "reward_mean": model.mean,
        "reward_std": model.std,
        "length_correlation": float(np.corrcoef(sampled, words)[0, 1]),
    }


def save(trainer: engine.Engine, model: RewardModel, variant: RewardVariant, out: Path) -> None:
    """Gather from all ranks, write from the first."""
    weights = list(trainer.named_weights(model.lm))
    head = {}
    for name, weight in model.head.named_parameters():
        with engine.gathered([weight]):
            head[name] = weight.detach().float().cpu().clone()
    if engine.rank() == 0:
        save_reward_model(out, model, weights, head, variant=variant.model_dump())
