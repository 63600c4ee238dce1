"""Every method of the table in docs/reward-models.md under DeepSpeed: it trains, it learns, it is saved and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.config import RewardVariant
from core.config.load import load
from rm import train
from rm.pairs import batch_plan, tokenise
from rm.variants import build
from tests.builders.plain_engine import PlainEngine
from tests.builders.planted_pairs import METHODS, pair_rows, settings, write_base
from tests.builders.processes import run_program

pytestmark = pytest.mark.slow
OF_SECTION = ("lora", "save", "micro_batch", "common_epochs", "common_lr")
"""Options of METHODS that are not the variant's."""


@pytest.fixture(scope="module")
def base(tokenizer_path, tmp_path_factory) -> Path:
    return write_base(tokenizer_path, tmp_path_factory.mktemp("methods") / "base")


@pytest.fixture(scope="module")
def found(base, tmp_path_factory) -> dict[str, dict]:
    """What two ranks of ZeRO-3 made of each method, all in one start."""
    out = tmp_path_factory.mktemp("methods") / "out"
    run_program("tests/programs/training/methods.py", base, out, ranks=2, timeout=1800)
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_planted_preferences(found, method):
    made = found[method]
    assert made["accuracy"] > 0.9
    assert made["read_again"] == made["accuracy"]
    adapter = METHODS[method].get("save") == "adapter"
    assert ("adapter_model.safetensors" if adapter else "model.safetensors") in made["files"]


def test_the_log_has_each_part_of_the_loss_by_itself(found):
    """loss = (1 - alpha) (reward loss + head_weight * head_penalty) + alpha regulariser, and each has its own scale."""
    for method, options in METHODS.items():
        variant = RewardVariant(**{k: v for k, v in options.items() if k not in OF_SECTION})
        alpha = variant.alpha if variant.text_regulariser != "none" else 0.0
        for row in found[method]["log"]:
            whole = row["reward_loss"] + variant.head_weight * row["head_penalty"]
            assert row["loss"] == pytest.approx((1 - alpha) * whole + alpha * row["regulariser"], rel=1e-4, abs=1e-5)
            assert (row["head_penalty"] != 0) == (variant.head in ("inform", "odin"))
    first = found["inform"]["log"][0]
    assert 0.3 < first["head_penalty"] < 2 and first["loss"] < 2 * first["reward_loss"]


@pytest.mark.parametrize("method", ["bt, linear head", "odin"])
def test_two_ranks_with_two_passes_each_equal_one_large_batch(found, base, method):
    cfg = load([], settings(base, **METHODS[method]))
    variant = cfg.rm.variants["it"]
    model, tokenizer = build(cfg.rm, cfg.engine, variant, cfg.run.seed)
    pairs, _ = tokenise(train.arm_rows(pair_rows(160, seed=1), variant, cfg.run.seed), tokenizer, cfg.rm, variant)
    first = batch_plan(pairs, cfg.rm, variant, cfg.run.seed)[0]
    engine = PlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.0))
    row = train.train_step(engine, model, variant, [pairs[i] for i in first], None)
    assert {key: found[method]["log"][0][key] for key in row} == pytest.approx(row, rel=1e-3, abs=1e-6)


def test_a_variants_own_epochs_and_rate_train_what_common_ones_do(found, base):
    """The same batches, learning rates and weights as where rm.epochs and rm.optim.lr have these values."""
    own, common = found["bt, own epochs and rate"], found["bt, linear head"]
    assert own["steps"] == common["steps"] == len(own["log"])
    for mine, theirs in zip(own["log"], common["log"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    mine, theirs = (load_file(Path(made["folder"]) / "model.safetensors") for made in (own, common))
    before = load_file(base / "model.safetensors")
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-6) for name in before)
    assert any(not torch.allclose(mine[name], before[name], atol=1e-3) for name in before)  # it was trained


def test_every_option_of_a_variant_is_among_them():
    """A new option comes with a method that uses it; the others change its pairs or a number in its loss."""
    tried = {option for options in METHODS.values() for option in options}
    others = {"alpha", "beta", "head_weight", "pairs", "label_noise", "seed", "data_seed"}
    assert set(RewardVariant.model_fields) - tried == others
    for option in ("head", "text_regulariser", "regularise"):
        known = set(RewardVariant.model_fields[option].annotation.__args__)
        used = {options.get(option, RewardVariant.model_fields[option].default) for options in METHODS.values()}
        assert used == known
