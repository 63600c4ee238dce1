"""A run whose weights become NaN: real vLLM, two ZeRO-3 ranks."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from core.files import read_rows
from tests.builders.command_line import grm
from tests.builders.processes import run_program


@pytest.mark.slow
def test_an_adapter_that_becomes_nan_stops_the_run_and_spoils_nothing(small_policy, tmp_path, capsys):
    """NaN compares false with every limit, so it was logged, saved and resumed from."""
    run_program("tests/programs/ppo_not_finite.py", small_policy, tmp_path, ranks=2)
    found = json.loads((tmp_path / "found.json").read_text())
    assert "ppo step 2:" in found["said"] and "log-probs by the actor are NaN or infinite" in found["said"]
    assert "ppo.actor.lr" in found["said"] and "on ranks 0, 1, of prompts " in found["said"]
    assert found["stopped"] == {"state": 1, "policies": ["step-0001"], "steps": [1]}
    (bundle,) = found["bundles"]
    assert f"`grm replay {bundle}`" in found["said"] and Path(bundle).parent == tmp_path / "faults"
    assert grm("replay", bundle) == 0
    shown = capsys.readouterr().out
    assert "first in lm.base_model.model.model.layers." in shown and ".lora_B.default (Linear), whose weights" in shown
    # What was saved before is good: the run continues from it.
    assert found["resumed"] == {"state": 2, "policies": ["step-0001", "step-0002"], "steps": [1, 2]}
    for step in (1, 2):
        adapter = load_file(tmp_path / "ppo" / "checkpoints" / f"step-{step:04d}" / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in adapter.values())
    rows = read_rows(tmp_path / "ppo" / "metrics.jsonl")
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.slow
def test_a_gradient_that_is_too_large_is_named_and_seen_again(small_policy, tmp_path, capsys):
    """Nothing is wrong in any forward pass: the fault is in the gradients alone."""
    run_program("tests/programs/ppo_not_finite.py", small_policy, tmp_path, "overflow", ranks=1)
    said = json.loads((tmp_path / "found.json").read_text())["said"]
    bundle = tmp_path / "faults" / "ppo-step-0001"
    assert "ppo step 1, on a minibatch: 1 of 1 values of actor_grad_norm are NaN or infinite" in said
    assert f"`grm replay {bundle}`" in said
    assert json.loads((bundle / "bundle.json").read_text())["phase"] == "gradient"
    assert grm("replay", bundle) == 0
    shown = capsys.readouterr().out
    assert "seen again" in shown and "the norm of all is inf" in shown
