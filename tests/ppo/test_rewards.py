"""Rewards of whole responses, advantages without a critic, and the warnings of a run."""

import math

import numpy as np
import pytest
import torch

from core.config import Reward
from ppo.math import grpo, kl_loss, reward_to_go, rloo
from ppo.rewards import RewardScale, final_rewards
from ppo.watch import CHECKS, warnings_of


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


def test_rloo_and_grpo_against_loops():
    groups = torch.tensor([3, 1, 3, 1, 3, 1])
    returns = torch.randn(6)
    for i in range(6):
        others = [float(returns[j]) for j in range(6) if j != i and groups[j] == groups[i]]
        assert float(rloo(returns, groups)[i]) == pytest.approx(float(returns[i]) - np.mean(others), abs=1e-6)
        mine = [float(returns[j]) for j in range(6) if groups[j] == groups[i]]
        expected = (float(returns[i]) - np.mean(mine)) / (np.std(mine, ddof=1) + 1e-6)
        assert float(grpo(returns, groups)[i]) == pytest.approx(expected, abs=1e-4)
    assert torch.equal(grpo(torch.ones(4), torch.zeros(4)), torch.zeros(4))


def test_reward_to_go_by_hand():
    mask = torch.tensor([[False, True, True, True]])
    found = reward_to_go(torch.tensor([[9.0, 1.0, 2.0, 4.0]]), mask, 0.5)
    assert found.tolist() == [[0.0, 1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]]


def test_the_gradient_of_the_kl_loss_is_that_of_the_exact_kl():
    """In expectation over all tokens of a small vocabulary; the gradient of k3 itself is another one."""
    logits, ref = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    logp, ref_logp = logits.log_softmax(0), ref.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref_logp)).sum(), logits, retain_graph=True)
    found, value = torch.zeros(6, dtype=torch.float64), 0.0
    for token in range(6):
        p = float(logp[token].detach().exp())
        one = torch.ones(1, 1, dtype=torch.bool)
        loss = kl_loss(logp[token].view(1, 1), ref_logp[token].view(1, 1), one)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        found += p * gradient
        value += p * float(loss.detach())
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-6)
    assert value == pytest.approx(float((logp.exp() * (logp - ref_logp)).sum()), abs=1e-6)


HEALTHY = {
    "kl_nats_per_response": 1.0, "clipfrac": 0.02, "approx_kl": 0.003, "explained_variance": 0.3, "value_loss": 0.5,
    "eos_rate": 0.8, "response_tokens": 40.0, "mismatch_mean_abs": 0.04, "proxy_se": 0.03, "proxy_mean": 0.0,
    "sync_survival": 1.0, "sync_slope": 1.0,
}  # fmt: skip
SICK = {
    "kl negative": {"kl_nats_per_response": -2.0},
    "kl exploding": {"kl_nats_per_response": 30.0},
    "clipfrac": {"clipfrac": 0.5},
    "approx kl": {"approx_kl": 0.4},
    "critic": {"explained_variance": -1.4},
    "value loss": {"value_loss": 5.0},
    "eos": {"eos_rate": 0.1},
    "length": {"response_tokens": 100.0},
    "mismatch": {"mismatch_mean_abs": 0.3},
    "merging": {"sync_survival": 0.1, "sync_slope": 0.2},
    "reward variance": {"proxy_se": 0.001},
    "proxy falling": {"proxy_mean": -0.5},
}


def test_a_healthy_run_has_no_warnings():
    rising = [HEALTHY | {"proxy_mean": 0.05 * i, "kl_nats_per_response": 0.3 * i} for i in range(12)]
    assert all(warnings_of(rising[:n]) == [] for n in range(1, 13))


@pytest.mark.parametrize("name", SICK)
def test_each_warning_is_given_once(name):
    assert SICK.keys() == CHECKS.keys()
    rows = [HEALTHY] * 5 + [HEALTHY | SICK[name]] * 4
    given = [text for n in range(1, len(rows) + 1) for text in warnings_of(rows[:n])]
    assert given == [CHECKS[name][1]]
