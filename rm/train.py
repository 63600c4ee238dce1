"""Stage `rm`: train every variant of the reward model on the same pairs, in the same order, and measure it.

The trainer is our own loop on the DeepSpeed engine that PPO uses, not trl.RewardTrainer: the regulariser needs
log-probs of chosen responses only, two models of one comparison must see identical batches, and
accelerate with DeepSpeed reports one process on every CPU rank.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core.batching import balanced
from core.config import Config, RewardVariant
from core.data.chat import ChatTokenizer, conversation
from core.data.labels import flip_labels, repeated
from core.data.streams import stream_seed
from core.errors import ArtefactError
from core.files import read_json, read_table, write_json, write_table
from core.models.layers import LowerCache, LowerLayers, train_top_layers
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.training import distributed, engine
from core.training.weights import gathered
from rm.checkpoints.adapters import describe_base, save_adapter_model
from rm.checkpoints.layout import save_reward_model
from rm.evaluation.metrics import accuracy_with_interval, pair_accuracy
from rm.model import RewardModel
from rm.objective import pair_logprobs, pair_losses
from rm.pairs import Pair, batch_plan, seed_name, tokenise
from rm.score import score


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    distributed.init_distributed()
    rows = read_table(inputs["preferences"] / "pairs.parquet")
    calibration = read_table(inputs["preferences"] / "calibration.parquet")
    train = [row for row in rows if row["split"] == "rm_train"]
    val = [row for row in rows if row["split"] == "rm_val"]
    if cfg.rm.save == "adapter":
        describe_base(cfg.rm.base)  # what it refuses is told before anything is trained
    metrics, lower = {}, {}
    for name, variant in cfg.rm.variants.items():
        done = out / name / "metrics.json"
        if not done.is_file():  # a killed stage goes on with the first unfinished variant
            depth = num_layers(cfg, variant)
            if depth not in lower:
                lower[depth] = lower_cache(cfg, variant)
            train_variant(cfg, name, variant, train, val, calibration, out / name, lower[depth])
        torch.distributed.barrier()
        metrics[name] = read_json(done)
    longest = [len(r["chosen"].split()) - len(r["rejected"].split()) for r in val if not r["flipped"]]
    parts = [
        f"{name} {m['accuracy_gold']['mean']:.3f} [{m['accuracy_gold']['lo']:.3f}, {m['accuracy_gold']['hi']:.3f}]"
        for name, m in metrics.items()
    ]
    judge = "the imported labels" if val[0]["gold_chosen"] is None else "gold"
    return {
        "headline": f"held-out accuracy against {judge} on {len(val)} pairs: " + ", ".join(parts),
        "judge": judge,
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
    lower: LowerCache | None = None,
) -> None:
    """Train one reward model and write its folder, `metrics.json` last."""
    started = time.time()
    if lower and not _lower_fits(cfg, variant):
        lower = None
    trainer, model, found = fit(cfg, name, variant, train, out, lower)
    found |= measure(trainer, model, val, calibration, out, lower)
    save(cfg, trainer, model, variant, out)
    if distributed.rank() == 0:
        write_json(out / "metrics.json", found | {"seconds": round(time.time() - started, 1)})


def fit(
    cfg: Config, name: str, variant: RewardVariant, train: list[dict], out: Path, lower: LowerCache | None = None
) -> tuple[engine.Engine, RewardModel, dict]:
    """The trained model in its engine, and how much it was trained on; `train.jsonl` is written into `out`."""
    model, tokenizer = build(cfg, variant)
    pairs, counts = tokenise(arm_rows(train, variant, cfg.run.seed), tokenizer, cfg, variant)
    batches = batch_plan(pairs, cfg, variant)
    trainer = engine.Engine(
        model, cfg.engine, micro_batch=cfg.rm.micro_batch, optim=cfg.rm.optim, total_steps=len(batches),
        accumulation=cfg.rm.global_batch // (cfg.rm.micro_batch * distributed.world_size()),
    )  # fmt: skip
    if variant.text_regulariser == "dpo" and variant.alpha > 0:
        pairs = with_reference(trainer, model, pairs, cfg.rm.micro_batch, lower)
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "train.jsonl").open("w") if distributed.rank() == 0 else None
    for step, batch in enumerate(
        tqdm(batches, desc=f"rm {name}", unit="step", disable=distributed.rank() != 0), start=1
    ):
        # Of InfoRM's latents and of dropout in adapters; named by step like all draws.
        torch.manual_seed(stream_seed(cfg.run.seed, "rm", "noise", step, distributed.rank(), *seed_name(variant)))
        row = {"step": step, **train_step(trainer, model, variant, [pairs[i] for i in batch], lower), "lr": trainer.lr}
        if log:
            log.write(json.dumps(row) + "\n")
            log.flush()
    model.eval()
    return trainer, model, {"pairs": len(pairs), **counts, "steps": len(batches)}


def build(cfg: Config, variant: RewardVariant) -> tuple[RewardModel, ChatTokenizer]:
    """The untrained model; heads of all variants of one seed start from the same numbers."""
    tokenizer = ChatTokenizer(cfg.rm.base)
    lm = load_causal_lm(cfg.rm.base, dtype=cfg.engine.dtype, num_layers=num_layers(cfg, variant))
    torch.manual_seed(stream_seed(cfg.run.seed, "rm", "head", *seed_name(variant)))
    if cfg.rm.lora and variant.trainable_layers is None:
        lm = add_lora(lm, cfg.rm.lora)
    else:
        train_top_layers(lm, _trainable(cfg, variant))
    return RewardModel(lm, variant.head, tokenizer), tokenizer


def arm_rows(train: list[dict], variant: RewardVariant, seed: int) -> list[dict]:
    """The rows that the variant is trained on: the first `pairs`, with `label_noise` of the labels flipped."""
    rows = train[: variant.pairs]
    if variant.pairs and len(rows) < variant.pairs:
        raise ArtefactError(f"rm.variants.*.pairs asks for {variant.pairs} training pairs; there are {len(train)}")
    # Repeated last: a copy of a pair must not get another label, nor count towards `pairs`.
    return repeated(
        flip_labels(rows, variant.label_noise, np.random.default_rng(stream_seed(seed, "arm_noise", len(rows))))
    )


def num_layers(cfg: Config, variant: RewardVariant) -> int | None:
    """Layers of the backbone that the variant keeps; None for all."""
    return cfg.rm.num_layers if variant.num_layers is None else variant.num_layers


def _trainable(cfg: Config, variant: RewardVariant) -> int | None:
    return cfg.rm.trainable_layers if variant.trainable_layers is None else variant.trainable_layers


def _lower_fits(cfg: Config, variant: RewardVariant) -> bool:
    """Whether the layers that are cached are frozen in this variant too; the cache is one of its `num_layers`."""
    return _trainable(cfg, variant) <= cfg.rm.trainable_layers


def with_reference(
    trainer: engine.Engine, model: RewardModel, pairs: list[Pair], micro: int, lower: LowerCache | None = None
) -> list[Pair]:
    """The pairs with the log-probs of the untrained model: computed once, so no second model is ever in memory."""
    model.eval()
    world = distributed.world_size()
    parts = balanced([pair.row for pair in pairs], max(1, len(pairs) // (micro * world)) * world)
    mine = []
    for part in tqdm(parts[distributed.rank() :: world], desc="rm: reference", disable=distributed.rank() != 0):
        mine += zip(part, pair_logprobs(trainer, model, [pairs[i] for i in part], lower), strict=True)
    model.train()
    found = dict(distributed.gather_rows(mine))
    return [replace(pair, reference=found[i]) for i, pair in enumerate(pairs)]


def train_step(
    trainer: engine.Engine,
    model: RewardModel,
    variant: RewardVariant,
    batch: list[Pair],
    lower: LowerCache | None,
) -> dict:
    """One optimiser step on a global batch; metrics are means over its pairs on all ranks."""
    parts = balanced([pair.row for pair in batch], distributed.world_size() * trainer.accumulation)
    mine = parts[distributed.rank() :: distributed.world_size()]
    sums = dict.fromkeys(("loss", "reward_loss", "regulariser", "accuracy"), 0.0)
    for part in mine:
        losses = pair_losses(trainer, model, variant, [batch[i] for i in part], lower)
        # DeepSpeed averages over passes and ranks, which hold unequally many pairs.
        trainer.backward(losses["loss"] * (len(part) * len(parts) / len(batch)))
        trainer.step()
        for key in sums:
            sums[key] += float(losses[key].detach()) * len(part)
    totals = distributed.global_sum(*sums.values())
    return {key: total / len(batch) for key, total in zip(sums, totals, strict=True)} | {"grad_norm": trainer.grad_norm}


def lower_cache(cfg: Config, variant: RewardVariant | None = None) -> LowerCache | None:
    """The cache that the configuration asks for, of the layers that are frozen in a backbone as deep as the variant's
    (default: as rm.num_layers); None where there are none. Every rank holds the layers whole, so that it needs no
    other."""
    if not cfg.rm.cache_frozen_layers:
        return None
    base = load_causal_lm(cfg.rm.base, dtype=cfg.engine.dtype, num_layers=num_layers(cfg, variant or RewardVariant()))
    if base.config.num_hidden_layers <= cfg.rm.trainable_layers:
        return None
    base.to(distributed.device())
    if base.config._attn_implementation.startswith("flash"):
        raise ArtefactError("rm.cache_frozen_layers needs rm.base.attention eager or sdpa: set one of them")
    layers = LowerLayers(base, base.config.num_hidden_layers - cfg.rm.trainable_layers)
    layers.check(base)
    return LowerCache(layers)


def measure(
    trainer: engine.Engine,
    model: RewardModel,
    val: list[dict],
    calibration: list[dict],
    out: Path,
    lower: LowerCache | None = None,
) -> dict:
    """Held-out accuracy, and mean and SD of the reward on samples of the reference policy (set on the model)."""
    texts = [conversation(r["prompt"], r[side]) for side in ("chosen", "rejected") for r in val]
    texts += [conversation(r["prompt"], r["response"]) for r in calibration]
    rewards = score(
        trainer, model.tokenizer, texts, share=model.shares_prompts, together=True, lower=lower,
        device=distributed.device(), progress="rm: validation",
    ).tolist()  # fmt: skip
    n = len(val)
    chosen, rejected, sampled = np.array(rewards[:n]), np.array(rewards[n : 2 * n]), np.array(rewards[2 * n :])
    model.mean, model.std = float(sampled.mean()), float(sampled.std(ddof=1))
    sign = np.where([r["flipped"] for r in val], -1.0, 1.0)
    if distributed.rank() == 0:
        rows = [
            {
                "prompt_id": r["prompt_id"],
                "pair_id": r["pair_id"],
                "reward_chosen": c,
                "reward_rejected": j,
                "flipped": r["flipped"],
            }
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


def save(cfg: Config, trainer: engine.Engine, model: RewardModel, variant: RewardVariant, out: Path) -> None:
    """Gather from all ranks, write from the first."""
    trainer.settle()
    head = {}
    for name, weight in model.head.named_parameters():
        with gathered([weight]):
            head[name] = weight.detach().float().cpu().clone()
    about = {"variant": variant.model_dump(), "run_seed": cfg.run.seed}
    if cfg.rm.save == "adapter" and hasattr(model.lm, "peft_config"):
        save_adapter_model(out, model, head, base=cfg.rm.base, **about)
        return
    weights = list(trainer.named_weights(model.lm))
    if distributed.rank() == 0:
        save_reward_model(out, model, weights, head, base=cfg.rm.base.path, **about)
