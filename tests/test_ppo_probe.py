"""A weight sync that did not happen is caught by the log-probs of the step's own responses."""

import json

import pytest

from ppo.train import MAX_MISMATCH
from tests.conftest import run_program


@pytest.mark.e2e
def test_a_skipped_sync_is_caught_and_a_done_one_passes(policy_path):
    found = json.loads(run_program("tests/programs/probe.py", policy_path).splitlines()[-1])
    assert "the new weights did not arrive" in found["skipped"]
    # Not 1 but for noise: merged weights are rounded to bfloat16, which swallows a little of a small update.
    assert found["synced"]["sync_slope"] == pytest.approx(1, abs=0.2)
    # so small that a bound on the difference would not have told it
    assert found["moved"] < MAX_MISMATCH
