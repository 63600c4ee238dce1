"""Stage `rm`: train every variant of the reward model on the same pairs, in the same order, and measure it.

The loop is our own, on the DeepSpeed engine that PPO uses too, and not trl.RewardTrainer, for two reasons: the
regulariser needs log-probs of chosen responses only, and two models that are compared must see identical batches.
Without a regulariser it computes what TRL's does (tests/rm/training/test_against_trl.py).
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core import config, starting, whereabouts
from core.config import Config, RewardTraining, RewardVariant
from core.data.rows import CalibrationRow, PairRow
from core.data.streams import stream_seed
from core.files import read_json, read_table, write_json
from core.models.logits import has_lm_head
from core.models.state_cache import FrozenStateCache
from core.models.weight_files import SHARD_BYTES
from core.parts import seal
from core.training import distributed
from core.training.engine import Engine
from core.training.sharding import gathered
from rm import faults
from rm.checkpoints.adapters import describe_base, save_adapter_model
from rm.checkpoints.layout import save_reward_model
from rm.measure import measure
from rm.model import RewardModel
from rm.objective import batch_correlations, divided, pair_logprobs, pair_losses
from rm.pairs import Pair, batch_plan, seed_name, tokenise
from rm.score import check_lengths
from rm.variants import arm_rows, build, fits_cache, frozen_state_cache, lm_head_of, num_layers

NOT_FINITE = (
    "Nothing of this reward model is saved. Lower rm.optim.lr, or the variant's own lr, or set engine.dtype=float32; "
    "at step 1, look for broken weights in rm.base.path"
)
"""What to do about numbers that are not finite."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    """Run the stage on this rank, or resume it with the first unfinished variant.

    Args:
        inputs: folder of the stage `preferences`.
        out: folder of this stage; each variant gets a folder in it.

    Returns:
        The metrics of the stage.
    """
    distributed.init_distributed()
    rows = read_table(inputs["preferences"] / "pairs.parquet", PairRow)
    calibration = read_table(inputs["preferences"] / "calibration.parquet", CalibrationRow)
    train = [row for row in rows if row["split"] == "rm_train"]
    val = [row for row in rows if row["split"] == "rm_val"]
    if cfg.rm.save == "adapter":
        describe_base(cfg.rm.base)  # fails on a base that it refuses before anything is trained
    metrics, caches = {}, {}
    for name, variant in cfg.rm.variants.items():
        done = out / name / "metrics.json"
        if not done.is_file():  # else a run that was killed has finished this variant
            depth = num_layers(cfg.rm, variant)
            if depth not in caches:
                caches[depth] = frozen_state_cache(cfg.rm, cfg.engine_of("rm"), variant)
            train_variant(cfg, name, variant, train, val, calibration, out / name, caches[depth])
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
    train: list[PairRow],
    val: list[PairRow],
    calibration: list[CalibrationRow],
    out: Path,
    cache: FrozenStateCache | None = None,
) -> None:
    """Train one reward model and write its folder `out`, with `metrics.json` last: the mark of a finished variant.

    Args:
        train, val: rows of pairs.parquet.
        calibration: rows of calibration.parquet.
        cache: of frozen states; not used where the variant trains one of the cached layers.
    """
    started = time.monotonic()
    if cache and not fits_cache(cfg.rm, variant):
        cache = None
    engine, model, metrics = fit(
        cfg.rm, cfg.engine_of("rm"), variant, train, out, name=name, seed=cfg.run.seed, cache=cache
    )
    whereabouts.enter(f"measure {name}")
    metrics |= measure(engine, model, val, calibration, out, cache)
    whereabouts.enter(f"save {name}")
    save(cfg.rm, engine, model, variant, out, seed=cfg.run.seed, shard_bytes=cfg.engine_of("rm").shard_bytes)
    del model
    engine.close()
    if distributed.rank() == 0:
        write_json(out / "metrics.json", metrics | {"seconds": round(time.monotonic() - started, 1)})
        seal(out)


def fit(
    rm: RewardTraining,
    settings: config.Engine,
    variant: RewardVariant,
    train: list[PairRow],
    out: Path,
    *,
    name: str,
    seed: int,
    cache: FrozenStateCache | None = None,
) -> tuple[Engine, RewardModel, dict]:
    """Train one reward model. Every rank must call it; `train.jsonl` is written into `out`.

    Args:
        train: rows of pairs.parquet to train on (`arm_rows` takes the variant's share of them).
        name: of the variant, for the progress bar.
        seed: `run.seed`.
        cache: of the layers that the variant keeps frozen.

    Returns:
        The engine, the model in it (in eval mode), and the counts of `rm.pairs.tokenise` and of steps.
    """
    model, tokenizer = build(rm, settings, variant, seed)
    pairs, counts = tokenise(arm_rows(train, variant, seed), tokenizer, rm, variant)
    check_lengths([pair.length for pair in pairs], model.positions, "training pair (bounded by rm.max_tokens)")
    batches = batch_plan(pairs, rm, variant, seed)
    engine = Engine(
        model, settings, micro_batch=rm.micro_batch, optim=rm.optim_of(variant), total_steps=len(batches),
        accumulation=rm.global_batch // (rm.micro_batch * distributed.world_size()),
    )  # fmt: skip
    if variant.text_regulariser == "dpo" and variant.regularises:
        pairs = with_reference(engine, model, pairs, rm.micro_batch, cache)
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "train.jsonl").open("w") if distributed.rank() == 0 else None
    starting.working()
    for step, batch in enumerate(
        tqdm(batches, desc=f"rm {name}", unit="step", disable=distributed.rank() != 0), start=1
    ):
        # For InfoRM's latents and dropout in adapters; named by step, like every draw.
        torch.manual_seed(stream_seed(seed, "rm", "noise", step, distributed.rank(), *seed_name(variant)))
        whereabouts.enter(f"train {name}", step)
        mine = [pairs[i] for i in batch]
        try:
            row = {"step": step, **train_step(engine, model, variant, mine, cache, where=f"rm {name}, step {step}")}
        except distributed.NotFinite as fault:
            raise faults.bundled(
                fault,
                out,
                engine,
                rm=rm,
                settings=settings,
                variant=variant,
                name=name,
                seed=seed,
                step=step,
                batch=mine,
            ) from None
        row["lr"] = engine.lr
        if rm.optim.skip_above:
            row["updates_skipped"] = engine.skipped
        if log:
            log.write(json.dumps(row) + "\n")
            log.flush()
    model.eval()
    skipped = {"updates_skipped": engine.skipped} if rm.optim.skip_above else {}
    return engine, model, {"pairs": len(pairs), **counts, "steps": len(batches), **skipped}


def with_reference(
    engine: Engine, model: RewardModel, pairs: list[Pair], micro: int, cache: FrozenStateCache | None = None
) -> list[Pair]:
    """The pairs with the log-probs of the untrained model. Computed before training, so that one model is in memory.

    Args:
        micro: pairs per forward pass on one rank, on average.
    """
    model.eval()
    world = distributed.world_size()
    parts = divided(model, pairs, max(1, len(pairs) // (micro * world)) * world)
    mine: list[tuple[int, tuple[float, float]]] = []
    for part in tqdm(parts[distributed.rank() :: world], desc="rm: reference", disable=distributed.rank() != 0):
        mine += zip(part, pair_logprobs(engine, model, [pairs[i] for i in part], cache), strict=True)
    model.train()
    references = dict(distributed.gather_rows(mine))
    return [replace(pair, reference=references[i]) for i, pair in enumerate(pairs)]


def train_step(
    engine: Engine,
    model: RewardModel,
    variant: RewardVariant,
    batch: list[Pair],
    cache: FrozenStateCache | None,
    *,
    where: str = "rm",
) -> dict:
    """One optimiser step on a global batch; every rank gives the whole batch and trains on its part.

    Args:
        where: stage and step, for the message.

    Returns:
        What `pair_losses` returns, means over the pairs of all ranks, and `grad_norm`.

    Raises:
        NotFinite: a loss or a gradient, with the weights as they were before the step; or a weight after it.
    """
    parts = divided(model, batch, distributed.world_size() * engine.accumulation)
    mine = [[batch[i] for i in part] for part in parts[distributed.rank() :: distributed.world_size()]]
    passes: list[dict[str, torch.Tensor]] = []
    check = lambda values, ids=(): distributed.check_finite(where, values, NOT_FINITE, ids)  # noqa: E731
    for pairs, correlations in zip(mine, batch_correlations(engine, model, mine, cache), strict=True):
        losses = pair_losses(engine, model, variant, pairs, cache, correlations)
        # DeepSpeed averages over passes and ranks, which hold different numbers of pairs.
        engine.backward(losses["loss"] * (len(pairs) * len(parts) / len(batch)))
        passes.append({key: value.detach() for key, value in losses.items()})
        if len(passes) == len(mine):  # the next call updates the weights, which a bundle must have as they are now
            found = distributed.numbers(passes)
            ids = [[pair.prompt_id for pair in part if pair.prompt_id] for part in mine]
            check({f"values of {key}": [row[key] for row in found] for key in losses}, ids)
        engine.step()
    check({"values of grad_norm": [engine.grad_norm]})
    check({faults.WEIGHTS: engine.trained_values()})
    sums = [sum(row[key] * len(part) for row, part in zip(found, mine, strict=True)) for key in found[0]]
    totals = distributed.global_sum(*sums)
    return {key: total / len(batch) for key, total in zip(found[0], totals, strict=True)} | {
        "grad_norm": engine.grad_norm
    }


def save(
    rm: RewardTraining, engine: Engine, model: RewardModel, variant: RewardVariant, out: Path, *, seed: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write the model's folder, whole or as an adapter (`rm.save`). Every rank must call it; the first one writes.

    A model that was trained without the LM head of its base gets it in its files all the same.

    Args:
        shard_bytes: as in `core.models.weight_files.write_weights`.
    """
    engine.settle()
    head = {}
    for name, weight in model.head.named_parameters():
        with gathered([weight]):
            head[name] = weight.detach().float().cpu().clone()
    about = {"variant": variant.model_dump(), "run_seed": seed}
    if rm.save == "adapter" and hasattr(model.lm, "peft_config"):
        save_adapter_model(out, model, head, base=rm.base, **about)
        return
    weights = engine.named_weights(model.lm)
    if distributed.rank() == 0:
        dtype, depth = next(model.lm.parameters()).dtype, num_layers(rm, variant)
        absent = () if has_lm_head(model.lm) else lm_head_of(rm.base, dtype, depth)
        save_reward_model(out, model, chain(weights, absent), head, shard_bytes=shard_bytes, base=rm.base.path, **about)
    else:
        weights.take_part()
