"""A state that PPO resumes from is the one that was saved, or is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from core.errors import ArtefactError
from ppo.ema import FILE, WeightAverage
from ppo.extend import mark_state, saved_state

STATE = {"step": 4, "kl": {"coef": 0.1 + 0.2}, "scale": {"mean": 1e-9, "count": 7}, "ranks": 2}


def test_the_mark_of_a_state_comes_back_as_it_was(tmp_path):
    assert saved_state(tmp_path, 2) == {"step": 0}
    mark_state(tmp_path, STATE)
    assert saved_state(tmp_path, 2) == STATE
    with pytest.raises(ArtefactError, match="written by 2 ranks and there are 3 now"):
        saved_state(tmp_path, 3)
    (tmp_path / "state" / "last.json").write_text(json.dumps(STATE))
    assert saved_state(tmp_path, 2) == STATE, "those of earlier versions"


@pytest.mark.parametrize("change", [lambda text: text.replace("0.3", "0.4"), lambda text: text[:40], lambda text: ""])
def test_a_mark_that_is_damaged_is_refused(tmp_path, change):
    mark_state(tmp_path, STATE)
    mark = tmp_path / "state" / "last.json"
    mark.write_text(change(mark.read_text()))
    with pytest.raises(ArtefactError, match="last.json"):
        saved_state(tmp_path, 2)


def test_an_average_of_weights_that_is_damaged_is_refused(tmp_path):
    average = WeightAverage.__new__(WeightAverage)  # of one tensor, without an engine
    weight = torch.nn.Parameter(torch.arange(50.0))
    average._trained, average.values = {"w": weight}, {}
    save_file({"w": torch.arange(50.0)}, tmp_path / FILE)
    sha256 = average.digest(tmp_path)
    average.load(tmp_path, sha256)
    assert torch.equal(average.values[weight], torch.arange(50.0))
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-3] ^= 1
    (tmp_path / FILE).write_bytes(content)
    average.load(tmp_path, None)  # an earlier version recorded nothing
    with pytest.raises(ArtefactError, match="ema.safetensors is damaged"):
        average.load(tmp_path, sha256)
