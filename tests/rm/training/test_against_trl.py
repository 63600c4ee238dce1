"""Our training of a Bradley-Terry reward model against TRL's, step by step."""

import json

import pytest

from tests.builders.planted_pairs import write_base
from tests.builders.processes import ROOT, run_program

PROGRAM = ROOT / "tests" / "programs" / "training" / "against_trl.py"


@pytest.fixture(scope="module")
def found(tokenizer_path, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("trl")
    run_program(PROGRAM, write_base(tokenizer_path, folder / "base"), folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "centred", "margin"])
def test_losses_and_weights_are_those_of_reward_trainer(found, case):
    """In float32, from equal weights, on the same pairs in the same order; with the options that must be equal.

    What these are is in docs/migration.md. eps is 1e-5 on both sides: with a smaller one Adam divides gradients that
    are nothing but rounding by themselves.
    """
    one = found[case]
    assert len(one["ours"]) == len(one["theirs"]) == 8
    assert one["ours"] == pytest.approx(one["theirs"], rel=1e-4)
    assert max(one["ours"]) - min(one["ours"]) > 0.05  # it learns
    assert one["apart"] < 1e-3 * one["moved"], one  # the weights moved a thousand times farther than they are apart
    assert one["moved"] > 0.01


@pytest.mark.slow
def test_centring_and_margin_change_the_losses(found):
    """So that agreement is not that of options that are not read."""
    first = {case: one["ours"][0] for case, one in found.items()}
    assert len({round(loss, 4) for loss in first.values()}) == 3
