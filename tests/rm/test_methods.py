"""Every method of the table in docs/reward-models.md under DeepSpeed: it trains, it learns, it is saved and read."""

from __future__ import annotations

import json

import pytest

from core.config import RewardVariant
from tests.builders.planted_pairs import METHODS, write_base
from tests.builders.processes import run_program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tokenizer_path, tmp_path_factory) -> dict[str, dict]:
    """What two ranks of ZeRO-3 made of each method, all in one start."""
    folder = tmp_path_factory.mktemp("methods")
    run_program("tests/programs/methods.py", write_base(tokenizer_path, folder / "base"), folder / "out", ranks=2)
    return json.loads((folder / "out" / "found.json").read_text())


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
        variant = RewardVariant(**{k: v for k, v in options.items() if k not in ("lora", "save")})
        alpha = variant.alpha if variant.text_regulariser != "none" else 0.0
        for row in found[method]["log"]:
            whole = row["reward_loss"] + variant.head_weight * row["head_penalty"]
            assert row["loss"] == pytest.approx((1 - alpha) * whole + alpha * row["regulariser"], rel=1e-4, abs=1e-5)
            assert (row["head_penalty"] != 0) == (variant.head in ("inform", "odin"))
    first = found["inform"]["log"][0]
    assert 0.3 < first["head_penalty"] < 2 and first["loss"] < 2 * first["reward_loss"]


def test_every_option_of_a_variant_is_among_them():
    """A new option comes with a method that uses it; these change which pairs are trained on, and nothing of the loss."""
    tried = {option for options in METHODS.values() for option in options}
    assert set(RewardVariant.model_fields) - tried == {"alpha", "beta", "head_weight", "pairs", "label_noise", "seed"}
    for option in ("head", "text_regulariser", "regularise"):
        known = set(RewardVariant.model_fields[option].annotation.__args__)
        used = {options.get(option, RewardVariant.model_fields[option].default) for options in METHODS.values()}
        assert used == known
