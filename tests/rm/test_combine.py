"""Ensemble combiners against formulas written out in loops, and what must hold for any ensemble."""

import math
import statistics

import numpy as np
import pytest
import torch

from core.errors import DataError
from rm import combine

RULES = ["mean", "min", "median", "uwo:0.5", "uwo:0", "quantile:0.25", "soft_min:0.7"]


def draws(members: int, conversations: int = 9) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(members).normal(size=(members, conversations)))


def by_hand(rule: str, values: list[float]) -> float:
    """One conversation's reward from those of the members."""
    name, _, number = rule.partition(":")
    k = len(values)
    average = math.fsum(values) / k
    if name == "uwo":
        return average - float(number) * math.fsum((v - average) ** 2 for v in values) / k
    if name == "soft_min":
        beta = float(number)
        return -beta * math.log(math.fsum(math.exp(-v / beta) for v in values) / k)
    if name == "quantile":
        return float(np.quantile(values, float(number)))
    return {"mean": average, "min": min(values), "median": statistics.median(values)}[name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("members", [1, 2, 5])
def test_combiners_by_hand(rule, members):
    rewards = draws(members)
    expected = [by_hand(rule, column) for column in rewards.T.tolist()]
    found = combine.combiner(rule)(rewards)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert combine.combiner(rule)(rewards.float()).dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_one_member_and_equal_members_give_the_member(rule):
    member = draws(1)
    for rewards in (member, member.expand(4, -1)):
        torch.testing.assert_close(combine.combiner(rule)(rewards), member[0])


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_members_does_not_matter(rule):
    rewards = draws(5)
    torch.testing.assert_close(combine.combiner(rule)(rewards[[3, 0, 4, 2, 1]]), combine.combiner(rule)(rewards))


def test_limits():
    rewards = draws(4)
    assert torch.equal(combine.uncertainty_weighted(rewards, 0.0), combine.mean(rewards))
    assert torch.equal(combine.quantile(rewards, 0.0), combine.minimum(rewards))
    assert torch.equal(combine.quantile(rewards, 1.0), rewards.amax(0))
    torch.testing.assert_close(combine.soft_minimum(rewards, 1e6), combine.mean(rewards), atol=1e-5, rtol=0)
    torch.testing.assert_close(combine.soft_minimum(rewards, 1e-4), combine.minimum(rewards), atol=1e-3, rtol=0)
    assert (combine.minimum(rewards) <= combine.soft_minimum(rewards, 0.5)).all()
    assert (combine.soft_minimum(rewards, 0.5) <= combine.mean(rewards)).all()


def test_members_are_brought_to_one_scale():
    """The same opinions in other units: after either way of scaling the members agree."""
    opinion = draws(1, 12)
    rewards = torch.cat([opinion, 3.0 * opinion + 50.0])
    means, stds = rewards.mean(1).tolist(), rewards.std(1).tolist()
    scaled = combine.standardise(rewards, means, stds)
    torch.testing.assert_close(scaled[0], scaled[1])
    np.testing.assert_allclose(scaled.numpy(), (rewards.numpy().T - means).T / np.array(stds)[:, None])
    prompts = [i % 4 for i in range(12)]
    offsets = torch.tensor([7.0, -3.0, 0.0, 11.0], dtype=torch.float64)[prompts]  # free in Bradley-Terry
    rewards = torch.stack([opinion[0], 2.0 * opinion[0] + offsets])
    spread = combine.within_prompt_std(rewards, prompts)
    centred = combine.centre_by_prompt(rewards, prompts, spread)
    torch.testing.assert_close(centred[0], centred[1])
    columns = [[float(opinion[0, i]) for i in range(12) if prompts[i] == p] for p in range(4)]
    squares = math.fsum((x - statistics.fmean(c)) ** 2 for c in columns for x in c)
    assert spread[0] == pytest.approx(math.sqrt(squares / (12 - 4)))
    assert float(centred[0, 4]) == pytest.approx((columns[0][1] - statistics.fmean(columns[0])) / spread[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused(rule, value):
    rewards = draws(3)
    rewards[1, 2] = value
    with pytest.raises(DataError, match=r"\[1, 2\]"):
        combine.combiner(rule)(rewards)


@pytest.mark.parametrize("rewards", [torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3, dtype=torch.long)])
def test_what_is_no_ensemble_is_refused(rewards):
    with pytest.raises(DataError, match="floats"):
        combine.mean(rewards)


@pytest.mark.parametrize("rule", ["max", "uwo", "uwo:x", "uwo:-1", "uwo:nan", "quantile:1.5", "soft_min:0", "mean:2"])
def test_rules_that_are_not_known_are_refused(rule):
    with pytest.raises(DataError):
        combine.combiner(rule)


def test_scales_that_do_not_fit_are_refused():
    rewards = draws(2)
    for means, stds in (([0.0], [1.0, 1.0]), ([0.0, 0.0], [1.0]), ([0.0, 0.0], [1.0, 0.0])):
        with pytest.raises(DataError, match="2 members"):
            combine.standardise(rewards, means, stds)
    with pytest.raises(DataError, match="need one prompt each"):
        combine.centre_by_prompt(rewards, ["a"], [1.0, 1.0])
    with pytest.raises(DataError, match="no prompt has two samples"):
        combine.within_prompt_std(rewards, list(range(9)))
