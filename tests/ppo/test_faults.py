"""Every phase of a PPO step that gives NaN leaves a bundle, and `grm replay` finds the fault again."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from core.training.bundles import read_bundle
from ppo import guard
from ppo.faults import phase_of, replay
from tests.builders.processes import run_program

SEEN = {
    # fault: what the message says, phase, and a line of the replay
    "actor": (r"log-probs by the actor are NaN or infinite, on ranks 0, 1, of prompts", "rollout",
              r"first in lm\.base_model.*layers\.\d+\..*lora_B\.default \(Linear\), whose weights"),
    "critic": (r"values by the critic are NaN", "rollout", r"first in lm\.model\.layers\.\d+\.mlp\.down_proj "),
    "proxy": (r"rewards of the proxy are NaN", "rollout", r"all: \d+ of \d+ rewards are NaN"),
    "advantages": (r"returns are NaN or infinite, on rank 1, of prompt", "advantages", r"\d+ of \d+ returns are NaN"),
    "loss": (r"values of policy_loss are NaN or infinite, on rank 1, of prompt", "loss",
             r"1 of 1 values of policy_loss are NaN"),
    "weights": (r"weights of the critic are NaN", "weights", r"lm\.model\.layers\.\d+\.mlp\.down_proj\.weight: 1 of"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tokenizer_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    run_program("tests/programs/ppo_faults.py", tokenizer_path, out, ranks=2)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("fault", SEEN)
def test_a_fault_is_told_and_seen_again(folder, fault):
    said, phase, line = SEEN[fault]
    message = json.loads((folder / "found.json").read_text())[fault]
    assert message.startswith("ppo step 1") and re.search(said, message), message
    bundle = read_bundle(folder / fault / "faults" / "ppo-step-0001")
    assert (bundle.about["phase"], bundle.about["step"]) == (phase, 1)
    seen, lines = replay(bundle)
    assert seen and any(re.search(line, found) for found in lines), lines


@pytest.mark.slow
def test_a_fault_that_is_gone_is_said_to_be(folder, tmp_path):
    """The reward model was put right meanwhile."""
    bundle = read_bundle(folder / "proxy" / "faults" / "ppo-step-0001")
    shutil.copytree(folder / "rm", tmp_path / "rm")
    seen, lines = replay(replace(bundle, about=bundle.about | {"reward_models": str(tmp_path / "rm")}))
    assert not seen and all(": 0 of " in found for found in lines)


def test_every_number_that_is_checked_has_a_phase():
    assert {phase_of(name)[0] for name in guard.OF_ROLLOUT.values()} == {"rollout"}
    assert phase_of(guard.OF_ROLLOUT["critic_outputs"]) == ("rollout", "critic")
    assert phase_of(guard.OF_ROLLOUT["ref_logprobs"]) == ("rollout", "actor")
    assert {phase_of(name) for name in guard.OF_ADVANTAGES.values()} == {("advantages", "")}
    assert phase_of("values of value_clipfrac") == ("loss", "critic") and phase_of("values of approx_kl")[1] == "actor"
    assert phase_of("values of critic_grad_norm") == ("gradient", "critic")
    assert phase_of("weights of the actor, merged for vLLM") == ("weights", "actor")
    assert phase_of("values of the metric sync_slope") == ("metrics", "")
