"""Stage `ppo` with a critic of adapters on the backbone of the policy: vLLM, two ranks, and a run that is continued."""

import pytest
from safetensors.torch import load_file

from tests.builders.inputs.tiny_run import copy_of, same, tiny_run
from tests.builders.processes import GRM, run_program

OPTIONS = {
    "critic_lora": {"rank": 4, "alpha": 8}, "critic_trainable_layers": None, "critic_init": "policy", "steps": 3,
    "critic": {"lr": 1e-3, "warmup": 0.0, "schedule": "constant"}, "engine": {"zero_stage": 2},
    "actor": {"lr": 1e-3, "warmup": 0.0, "schedule": "constant"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_that_is_continued_is_that_of_one_go(tokenizer_path, tmp_path):
    """Two steps, and the third from the saved state; the policy has the tensors of its base and no others."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    config = tiny_run(tokenizer_path, whole, **OPTIONS)
    run_program(*GRM[1:], "ppo", "-c", config)
    other = copy_of(whole, parts)
    run_program(*GRM[1:], "ppo", "-c", other, "ppo.steps=2")
    run_program(*GRM[1:], "ppo", "-c", other)
    assert same(whole / "tiny", parts / "tiny")
    policy = load_file(whole / "tiny" / "ppo" / "policy" / "model.safetensors")
    base = load_file(whole / "policy" / "model.safetensors")
    assert policy.keys() == base.keys() and any(not w.equal(base[name]) for name, w in policy.items())
    adapter = load_file(whole / "tiny" / "ppo" / "checkpoints" / "step-0003" / "adapter_model.safetensors")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in adapter)
