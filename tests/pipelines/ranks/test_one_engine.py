"""PPO whose two ranks hold one vLLM engine together."""

import subprocess

import pytest

from core.files import read_rows
from tests.builders.inputs.tiny_run import tiny_run
from tests.builders.processes import GRM, ROOT


@pytest.mark.slow
def test_ppo_with_an_engine_of_two_ranks(tokenizer_path, tmp_path):
    config = tiny_run(tokenizer_path, tmp_path, overrides={"tensor_parallel_size": 2})
    done = subprocess.run(
        [*GRM, "ppo", "-c", str(config), "ppo.steps=3"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = read_rows(tmp_path / "tiny" / "ppo" / "metrics.jsonl")
    assert len(rows) == 3 and rows[2]["kl_k3_nats_per_response"] > 1e-6
    # float32 on both sides: a response of the other rank, or a weight that did not arrive, would be far off
    assert all(row["mismatch_mean_abs"] < 1e-4 for row in rows)
    assert all(row["sync_slope"] == pytest.approx(1, abs=1e-3) for row in rows)
    refused = subprocess.run(
        [*GRM, "ppo", "-c", str(config), "ppo.engine.processes=1"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2 and "tensor_parallel_size 2 does not divide 1 ranks" in refused.stderr
