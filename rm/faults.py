"""Bundles of reward models' training steps whose numbers were NaN or infinite, and what `grm replay` makes of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from core import config
from core.config import RewardTraining, RewardVariant
from core.data.streams import stream_seed
from core.models.tracing import gradients, traced
from core.training.bundles import Bundle, faults_folder, put_weights, save_bundle
from core.training.distributed import NotFinite, device, world_size
from core.training.engine import Engine
from rm.objective import batch_correlations, divided, pair_losses
from rm.pairs import Pair, seed_name
from rm.variants import build

WEIGHTS = "trained weights"
"""What is said of them."""


def bundled(
    fault: NotFinite, out: Path, engine: Engine, *, rm: RewardTraining, settings: config.Engine,
    variant: RewardVariant, name: str, seed: int, step: int, batch: list[Pair],
) -> NotFinite:  # fmt: skip
    """Write the bundle of a fault into the run's folder; the fault with a message that names it.

    Every rank must call it.

    Args:
        out: the variant's folder.
        batch: the global batch of the step.
    """
    about: dict[str, Any] = {
        "stage": "rm", "rm": rm.model_dump(mode="json"), "engine": settings.model_dump(mode="json"),
        "variant": variant.model_dump(mode="json"), "seed": seed, "step": step, "ranks": world_size(),
        "accumulation": engine.accumulation, "pairs": [asdict(pair) for pair in batch],
    }  # fmt: skip
    return save_bundle(fault, faults_folder(out) / f"rm-{name}-step-{step:04d}", about, {}, engine.module)


def replay(bundle: Bundle) -> tuple[bool, list[str]]:
    """Run the training step of a bundle again, in this process; whether the fault was seen again, and lines on it."""
    about = bundle.about
    rm, variant = RewardTraining.model_validate(about["rm"]), RewardVariant.model_validate(about["variant"])
    pairs = [_pair(fields) for fields in about["pairs"]]
    if bad := [name for name, weight in bundle.weights.items() if not weight.isfinite().all()]:
        lines = [f"{len(bad)} of {len(bundle.weights)} {WEIGHTS} are not finite, the first {bad[0]}"]
        if about["name"] == WEIGHTS:
            return True, lines
    else:
        lines = [f"all {WEIGHTS} are finite"]
    model, _ = build(rm, config.Engine.model_validate(about["engine"]), variant, about["seed"])
    put_weights(model, bundle.weights)
    model.to(device()).train()
    parts = [[pairs[i] for i in part] for part in divided(model, pairs, about["ranks"] * about["accumulation"])]
    seen = False
    correlations = batch_correlations(model, model, parts)
    for rank in range(about["ranks"]):
        torch.manual_seed(stream_seed(about["seed"], "rm", "noise", about["step"], rank, *seed_name(variant)))
        for i in range(rank, len(parts), about["ranks"]):
            with traced(model) as trace:
                losses = pair_losses(model, model, variant, parts[i], None, correlations[i])
            losses["loss"].backward()
            wrong = [name for name, value in losses.items() if not value.isfinite()]
            if wrong:
                ids = ", ".join(dict.fromkeys(pair.prompt_id for pair in parts[i] if pair.prompt_id))
                lines.append(f"rank {rank}, pairs of {ids}: {', '.join(wrong)} not finite"
                             f"; first in {trace.first or 'what follows the last layer'}")  # fmt: skip
            seen = seen or bool(wrong)
    if not seen:
        seen, found = gradients(model)
        lines += ["all losses are finite", *found]
    return seen, lines


def _pair(fields: dict[str, Any]) -> Pair:
    """From JSON, which has no tuples."""
    turns = tuple((int(start), int(stop)) for start, stop in fields["turns"])
    return Pair(**{**fields, "turns": turns, "reference": tuple(fields["reference"])})
