"""Updates that are left out: by hand, and under DeepSpeed at every stage."""

import json
import statistics

import pytest

from core.training.optimizer import FEWEST, WINDOW, Spikes
from tests.builders.processes import run_program


def test_a_spike_is_so_many_standard_deviations_above_the_mean():
    spikes, norms = Spikes(6.0), [1.0 + 0.1 * (i % 2) for i in range(FEWEST)]
    for norm in norms[:-1]:
        spikes.add(norm)
    assert not spikes.is_spike(100.0)  # one norm too few is known
    spikes.add(norms[-1])
    limit = statistics.fmean(norms) + 6 * statistics.stdev(norms)
    assert spikes.is_spike(limit + 1e-6) and not spikes.is_spike(limit - 1e-6)
    assert not Spikes(None).is_spike(1e30)


def test_spikes_are_counted_and_a_new_level_is_soon_none():
    spikes = Spikes(6.0)
    for i in range(WINDOW):
        spikes.add(1.0 + 0.01 * (i % 3))
    for _ in range(WINDOW):
        spikes.add(50.0)
    assert 1 <= spikes.skipped < 10
    again = Spikes(6.0)
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert again.state_dict() == spikes.state_dict()


@pytest.mark.slow
def test_updates_that_are_left_out_change_nothing_at_any_stage(tmp_path):
    """A spike is counted and training goes on; a gradient that is not finite leaves the weights as they were."""
    run_program("tests/programs/spikes.py", tmp_path, ranks=2)
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {f"{stage} {dtype}" for stage in range(4) for dtype in ("float32", "bfloat16")}
    for name, facts in found.items():
        assert facts == {
            "moved": True, "spike_kept": True, "skipped": 1, "moved_after": True, "resumed": 1, "nan_kept": True,
            "nan_norm": "inf",
        }, name  # fmt: skip
