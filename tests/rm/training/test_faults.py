"""A reward model's step that gives NaN: the message, the bundle, and the same step again."""

import math

import pytest
import torch

from core.config.load import load
from core.training.bundles import read_bundle
from core.training.distributed import NotFinite
from rm import faults, train
from rm.pairs import batch_plan, tokenise
from rm.variants import build
from tests.builders.plain_engine import PlainEngine
from tests.builders.planted_pairs import METHODS, pair_rows, settings, write_base


@pytest.fixture(scope="module")
def base(tokenizer_path, tmp_path_factory):
    return write_base(tokenizer_path, tmp_path_factory.mktemp("faults") / "base")


def spoilt(base, method: str, spoil) -> tuple[str, list[str], bool]:
    """The message and the replay of one step of two passes, after `spoil(model, engine)`."""
    cfg = load([], settings(base, **METHODS[method]))
    variant = cfg.rm.variants["it"]
    model, tokenizer = build(cfg.rm, cfg.engine, variant, cfg.run.seed)
    pairs, _ = tokenise(train.arm_rows(pair_rows(32, seed=1), variant, cfg.run.seed), tokenizer, cfg.rm, variant)
    batch = [pairs[i] for i in batch_plan(pairs, cfg.rm, variant, cfg.run.seed)[0]]
    engine = PlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.0), 2)
    spoil(model, engine)
    with pytest.raises(NotFinite) as raised:
        train.train_step(engine, model, variant, batch, None, where="rm it, step 1")
    out = base.parent / method / "rm.partial" / "it"
    told = faults.bundled(
        raised.value, out, engine, rm=cfg.rm, settings=cfg.engine, variant=variant, name="it", seed=cfg.run.seed,
        step=1, batch=batch,
    )  # fmt: skip
    seen, lines = faults.replay(read_bundle(base.parent / method / "faults" / "rm-it-step-0001"))
    return str(told), lines, seen


def break_layer(model, _):
    model.lm.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan


@pytest.mark.parametrize("method", ["bt, linear head", "grm sft", "inform", "odin"])
def test_a_broken_layer_is_named(base, method):
    said, lines, seen = spoilt(base, method, break_layer)
    assert "rm it, step 1: 2 of 2 values of loss are NaN or infinite, of prompts 1-" in said and "`grm replay" in said
    assert seen and any("first in lm.model.layers.1.mlp.up_proj (Linear), whose weights" in line for line in lines)


def test_weights_that_an_update_broke_are_named(base):
    def breaks(model, engine):
        engine.optimizer.step = lambda: break_layer(model, engine)

    said, lines, seen = spoilt(base, "bt, mlp head", breaks)
    assert "trained weights are NaN or infinite" in said
    assert seen and "the first lm.model.layers.1.mlp.up_proj.weight" in lines[0]
