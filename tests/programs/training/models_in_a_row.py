"""Reward models that one process trains one after the other, on the ranks of torchrun: which of them stay in memory.

A layout is STAGE:TYPE.
"""

import json
import sys
import weakref
from pathlib import Path

from core import starting
from core.config import RewardVariant
from core.config.load import load
from core.training import distributed
from rm import train
from tests.builders.planted_pairs import pair_rows, settings

VARIANTS = {"bt": {}, "sft": {"text_regulariser": "sft"}, "dpo": {"text_regulariser": "dpo"}}
WATCHED: list[tuple[weakref.ref, ...]] = []


def watched(*args, **options):
    """`rm.train.fit`, that keeps an eye on the model, its weights, its engine and its optimiser."""
    engine, model, metrics = FIT(*args, **options)
    optimiser = engine._deepspeed.optimizer
    parts = (model, next(model.lm.parameters()), engine, engine._deepspeed, optimiser)
    WATCHED.append(tuple(weakref.ref(part) for part in parts))
    return engine, model, metrics


def main(base: str, out: str, *layouts: str) -> None:
    distributed.init_distributed()
    pairs, found = pair_rows(32, seed=1), {}
    calibration = [row | {"sample_id": 0} for row in pairs[:4]]
    for layout in layouts:
        stage, dtype = layout.split(":")
        cfg = load([], settings(base, micro_batch=4, common_epochs=1)
                   + [f"engine.zero_stage={stage}", f"engine.dtype={dtype}"])  # fmt: skip
        WATCHED.clear()
        starting._working = None  # so that the first model of each layout is among what `working` freezes
        for name, options in VARIANTS.items():
            variant = RewardVariant.model_validate(options)
            train.train_variant(cfg, name, variant, pairs, pairs[:8], calibration, Path(out, layout, name))
        found[layout] = [[part() is not None for part in parts] for parts in WATCHED]
    if distributed.rank() == 0:
        Path(out, "found.json").write_text(json.dumps(found))


FIT, train.fit = train.fit, watched
main(*sys.argv[1:])
