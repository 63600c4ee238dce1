"""vLLM against transformers, on the real model."""

import json

import pytest

from tests.builders.processes import run_program


@pytest.mark.slow
def test_vllm_equals_transformers_before_and_after_sync(policy_path):
    found = json.loads(run_program("tests/programs/vllm_parity.py", policy_path).splitlines()[-1])
    # float32 on both sides: only the order of sums differs
    for when in ("before", "after"):
        assert found[when]["agree"] == 1.0, found
        assert found[when]["worst"] < 2e-3, found
    # the comparison would notice old weights
    assert found["stale"]["worst"] > 0.1, found
    assert found["seeded"] == [True, False]
    assert found["narrow"] == [True, True]


@pytest.mark.slow
def test_adapters_beside_the_weights_replace_each_other(small_policy, tmp_path):
    found = json.loads(run_program("tests/programs/adapter_sync.py", small_policy, tmp_path).splitlines()[-1])
    assert max(found["gaps"] + found["on_policy"]) < 2e-3, found
    assert min(found["stale"]) > 0.1, found
