"""Rewards of whole responses and their scale."""

import math

import pytest
import torch

from core.config import Reward
from ppo.rewards import RewardScale, final_rewards


def final(raw, finished=True, tokens=10, **options):
    return float(
        final_rewards(Reward(**options), torch.tensor([raw]), torch.tensor([finished]), torch.tensor([tokens]))
    )


def test_penalties_clip_and_shapes_by_hand():
    assert final(1.5) == 1.5
    assert final(20.0, clip=3.0) == 3.0
    assert final(20.0, clip=None) == 20.0
    assert final(1.0, finished=False, missing_eos_penalty=0.7) == pytest.approx(0.3)
    assert final(1.0, missing_eos_penalty=0.7) == 1.0
    assert final(1.0, tokens=30, length_penalty=0.01) == pytest.approx(0.7)
    # the penalties are not clipped away
    assert final(5.0, finished=False, clip=1.0, missing_eos_penalty=3.0) == pytest.approx(-2.0)
    assert final(2.0, shape="par", center=0.5) == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert final(2.0, shape="log_sigmoid", center=0.5) == pytest.approx(-math.log(1 + math.exp(-1.5)))


@pytest.mark.parametrize("kind", ["par", "log_sigmoid"])
def test_shapes_saturate_above_and_keep_the_order(kind):
    at = [final(x, shape=kind, clip=None) for x in (-4.0, -1.0, 0.0, 1.0, 4.0, 8.0)]
    assert at == sorted(at) and len(set(at)) == len(at)
    assert at[-1] - at[-2] < 0.05 < at[3] - at[2]


def test_running_scale_is_that_of_all_rewards_so_far():
    scale = RewardScale(Reward(normalise="running"), 99.0, 99.0)
    parts = [torch.randn(n) * 3 + 7 for n in (5, 1, 40)]
    for i in range(len(parts)):
        scale.update(parts[i : i + 1])
        if i == 1:  # a resumed run continues from what was saved
            state, scale = scale.state_dict(), RewardScale(Reward(normalise="running"), 99.0, 99.0)
            scale.load_state_dict(state)
    every = torch.cat(parts).double().numpy()
    assert scale.mean == pytest.approx(every.mean(), abs=1e-9) and scale.std == pytest.approx(every.std(ddof=1))


def test_fixed_scales_do_not_move():
    for normalise, expected in (("calibration", (2.0, 4.0)), ("none", (0.0, 1.0))):
        scale = RewardScale(Reward(normalise=normalise), 2.0, 4.0)
        scale.update([torch.randn(9)])
        assert (scale.mean, scale.std) == expected
