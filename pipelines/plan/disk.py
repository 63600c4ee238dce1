"""Bytes that the stages leave on disk, and the most that a stage takes while it runs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipelines.plan.pools import bon_prompts, checkpoints, eval_prompts, pool_bytes
from pipelines.plan.sizes import Sizes
from pipelines.plan.training import state_bytes

TOKENIZER = 4 << 20
"""Of the tokenizer and the small files that every saved model has beside its weights."""
REPORT = 4 << 20
PROMPT = 600
"""Of a prompt in a table."""
ROW, TOKEN = 250, 20
"""Of a response in a table of rollouts, and of each of its tokens: its id, three log-probs, its text."""
LOGGED = 2500
"""Of a step in metrics.jsonl and TensorBoard."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Disk:
    left: float
    """Bytes that stay."""
    peak: float
    """Bytes at the moment when the stage takes most."""


def disk_of(sizes: Sizes, stage: str) -> Disk:
    cfg, lengths = sizes.cfg, sizes.lengths
    if stage == "prompts":
        return _same(sum(lengths.prompts.values()) * PROMPT)
    if stage == "preferences":
        pairs = sum(lengths.pairs.values())
        samples = 2 * (lengths.calibration + (0 if cfg.preferences.sources else pairs))
        # samples.parquet, the shards until the stage ends, and the pairs
        pools = pool_bytes(sizes, samples)
        return Disk(pools + pool_bytes(sizes, 2 * pairs), 2 * pools + pool_bytes(sizes, 2 * pairs))
    if stage == "rm":
        return _same(sum(_reward_model(sizes, name) for name in cfg.rm.variants))
    if stage == "bon":
        samples = bon_prompts(sizes) * cfg.bon.samples
        scores = 80 * samples * (len(cfg.rm.variants) + 1)
        return Disk(pool_bytes(sizes, samples) + scores, 2 * (pool_bytes(sizes, samples) + scores))
    if stage == "ppo":
        return _ppo(sizes)
    if stage == "eval":
        samples = (1 + checkpoints(sizes)) * eval_prompts(sizes) * cfg.eval.samples
        return _same(2 * pool_bytes(sizes, samples))
    return _same(REPORT)


def _same(left: float) -> Disk:
    return Disk(left, left)


def _reward_model(sizes: Sizes, name: str) -> float:
    variant = sizes.cfg.rm.variants[name]
    shape, part = sizes.variant_shape(variant), sizes.rm_part(variant)
    adapter = sizes.cfg.rm.save == "adapter" and part.kind == "lora"
    return (sizes.rm_trained(variant) if adapter else shape.params) * sizes.bytes_per_weight + TOKENIZER


def _ppo(sizes: Sizes) -> Disk:
    """Checkpoints, the policy (and its average), the state; a state is written before the last one is deleted."""
    cfg, size = sizes.cfg.ppo, sizes.bytes_per_weight
    one = sizes.actor_trained * size + (0 if cfg.lora else TOKENIZER)
    policies = checkpoints(sizes) * one
    whole = (sizes.policy.params * size + TOKENIZER) * (1 + (cfg.ema is not None))
    state = state_bytes(sizes)
    saved = len(range(cfg.save_every, cfg.steps, cfg.save_every)) + cfg.keep_state
    most = min(saved, 2) * state
    left = policies + whole + (state if cfg.keep_state else 0)
    rollouts = cfg.steps * cfg.rollouts * (ROW + TOKEN * sizes.lengths.response_tokens)
    samples = cfg.steps * LOGGED + min(rollouts, cfg.keep_rollouts_mib * MIB)
    return Disk(left + samples, max(left, policies + most + (whole if cfg.keep_state else 0)) + samples)


def disk_warnings(stages: dict[str, Disk], folder: Path) -> tuple[float, list[str]]:
    """(the most that all stages take one after the other, warnings where the file system has less)."""
    most, kept = 0.0, 0.0
    for disk in stages.values():
        most = max(most, kept + disk.peak)
        kept += disk.left
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if most > free:
        gb = lambda count: f"{count / 1e9:.1f} GB"  # noqa: E731
        return most, [f"disk: the run needs {gb(most)} at its peak, and the disk of {folder} has {gb(free)} free here"]
    return most, []
