"""Importance weights and masks against loops over tokens that multiply probabilities, as the papers write them."""

import itertools
import math

import pytest
import torch

from core.config import Clip, ImportanceMask, Kl, Ppo, Reward
from ppo import update
from ppo.math import policy_loss
from ppo.methods.correction import correction_metrics, importance_weights
from ppo.rewards import RewardScale
from ppo.update import Learner
from tests.builders.plain_engine import PlainEngine, TablePolicy
from tests.builders.ppo_tables import STATES, V, micro, state_of

LENGTHS = [1, 6, 3, 4, 5]
B, T = len(LENGTHS), 7
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
LEVELS = ["token", "sequence", "geometric"]


def draws(seed: int, hidden: float = math.nan) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of actor and sampler whose ratios spread over about [0.2, 5]; `hidden` outside responses."""
    g = torch.Generator().manual_seed(seed)
    sampler = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    logp = sampler + 0.6 * torch.randn(B, T, generator=g, dtype=torch.float64)
    return torch.where(MASK, logp, hidden), torch.where(MASK, sampler, hidden)


def ratio_of(level: str, logp: torch.Tensor, sampler: torch.Tensor, i: int, t: int) -> float:
    """By probabilities, not by sums of log-probs."""
    own = [math.exp(logp[i, s]) / math.exp(sampler[i, s]) for s in range(LENGTHS[i])]
    if level == "token":
        return own[t]
    product = math.prod(own)
    return product if level == "sequence" else product ** (1 / LENGTHS[i])


def brute_force(clip: Clip, logp: torch.Tensor, sampler: torch.Tensor) -> tuple[list, list, list]:
    """Weight of each token; and which are masked and which truncated."""
    weights, masked, truncated = [], [], []
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            ratio = ratio_of(clip.importance_level, logp, sampler, i, t)
            weight = 1.0 if clip.importance_weight is None else min(ratio, clip.importance_weight)
            m = clip.importance_mask
            out = m is not None and not m.low <= ratio_of(m.level, logp, sampler, i, t) <= m.high
            weights.append(0.0 if out else weight)
            masked.append((i, out))
            truncated.append((i, not out and clip.importance_weight is not None and ratio > clip.importance_weight))
    return weights, masked, truncated


RANGES = [("token", 0.5, 1.5), ("sequence", 0.4, 2.0), ("geometric", 0.8, 1.1), ("sequence", 0.0, 1.2)]
MASKS = [None, *(ImportanceMask(level=level, low=low, high=high) for level, low, high in RANGES)]


@pytest.mark.parametrize(("level", "cap", "mask"), list(itertools.product(LEVELS, [None, 1.3, 50.0], MASKS)))
def test_weights_are_those_of_a_loop_over_tokens(level, cap, mask):
    clip = Clip(importance_weight=cap, importance_level=level, importance_mask=mask)
    logp, sampler = draws(3)
    found = importance_weights(clip, logp.requires_grad_(), sampler, MASK)
    if cap is None and mask is None:
        assert found is None
        return
    weights, masked, truncated = brute_force(clip, logp.detach(), sampler)
    assert found.weights[MASK].tolist() == pytest.approx(weights, rel=1e-12)
    assert found.masked[MASK].tolist() == [out for _, out in masked]
    assert found.truncated[MASK].tolist() == [cut for _, cut in truncated]
    assert not found.weights.requires_grad
    if mask and mask.low:
        assert 0 < sum(out for _, out in masked) < MASK.sum(), "the test must have tokens of both kinds"


def test_the_default_is_what_it_was_to_the_bit():
    g = torch.Generator().manual_seed(0)
    logp, sampler = (torch.randn(B, T, generator=g) * scale for scale in (2.0, 12.0))  # some beyond exp(20)
    before = (logp - sampler).detach().clamp(-20.0, 20.0).exp().clamp(max=2.0)
    assert Clip().importance_weight == 2.0
    assert torch.equal(importance_weights(Clip(), logp, sampler, MASK).weights, before)


def test_icepop_is_eq_1_of_its_paper():
    """1 / sum_i |y_i| * sum of M(k) * min(ratio * A, clipped ratio * A): masked tokens stay in the denominator."""
    logp, sampler = draws(4, hidden=0.0)
    clip = Clip(importance_weight=5.0, importance_mask=ImportanceMask())
    new = torch.where(MASK, logp + 0.3 * torch.randn(B, T, generator=torch.Generator().manual_seed(8)), 0.0)
    advantages = torch.linspace(-1, 1, B, dtype=torch.float64)[:, None].expand(B, T)
    weight = importance_weights(clip, logp, sampler, MASK).weights
    loss, _ = policy_loss(new, logp, advantages, MASK, 0.2, 0.2, is_weight=weight)
    total, inside = 0.0, 0
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            k = math.exp(logp[i, t] - sampler[i, t])
            ratio, a = math.exp(new[i, t] - logp[i, t]), float(advantages[i, t])
            inside += 0.5 <= k <= 5.0
            total += (k if 0.5 <= k <= 5.0 else 0.0) * min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    assert 0 < inside < sum(LENGTHS)
    assert float(loss) == pytest.approx(-total / sum(LENGTHS), rel=1e-9)


def test_log_ratios_that_are_not_finite_are_not_hidden_by_a_mask():
    logp, sampler = draws(5, hidden=0.0)
    logp[1, 2] = math.nan
    for level in LEVELS:
        clip = Clip(importance_level=level, importance_mask=ImportanceMask(level=level))
        assert importance_weights(clip, logp, sampler, MASK).weights.isnan().any()
        alone = clip.model_copy(update={"importance_weight": None})
        assert importance_weights(alone, logp, sampler, MASK).weights.isnan().any()


def weighed(clip: Clip, micros: list) -> list:
    found = [(m.is_response, importance_weights(clip, m.logprobs, m.sampler_logprobs, m.is_response)) for m in micros]
    return [(mask, weights) for mask, weights in found if weights]


@pytest.mark.parametrize("level", LEVELS)
def test_metrics_count_tokens_or_responses(level):
    clip = Clip(importance_weight=1.05, importance_level=level,
                importance_mask=ImportanceMask(level=level, low=0.8, high=2.0))  # fmt: skip
    micros, weights, ratios = [], [], []
    masked, truncated = dict[tuple, bool](), dict[tuple, bool]()
    for k, seed in enumerate((3, 6, 7, 9)):
        logp, sampler = draws(seed, hidden=0.0)
        m = micro(LENGTHS, [0.0] * B, seed=1, columns=T + 1)
        m.logprobs, m.sampler_logprobs = logp, sampler
        micros.append(m)
        of_tokens, outs, cuts = brute_force(clip, logp, sampler)
        weights += of_tokens
        ratios += [ratio_of(level, logp, sampler, i, t) for i, n in enumerate(LENGTHS) for t in range(n)]
        units = [(k, i) if level != "token" else (k, i, t) for i, n in enumerate(LENGTHS) for t in range(n)]
        masked |= {unit: out for unit, (_, out) in zip(units, outs, strict=True)}
        truncated |= {unit: cut for unit, (_, cut) in zip(units, cuts, strict=True)}
    found = correction_metrics(clip, weighed(clip, micros))
    assert found == pytest.approx({
        "is_weight_mean": sum(weights) / len(weights), "is_weight_max": max(weights), "is_ratio_max": max(ratios),
        "is_truncated_share": sum(truncated.values()) / len(truncated),
        "is_masked_share": sum(masked.values()) / len(masked),
    })  # fmt: skip
    assert 0 < found["is_truncated_share"] < 1 and 0 < found["is_masked_share"] < 1
    assert weighed(Clip(importance_weight=None), micros) == []
    assert correction_metrics(Clip(importance_weight=None), []) == {}
    assert "is_masked_share" not in correction_metrics(Clip(), weighed(Clip(), micros))


def test_a_masked_response_teaches_the_policy_nothing(monkeypatch):
    """An update of a rollout with a masked response is that of one where its advantages are 0."""
    monkeypatch.setitem(update.FIRST_RATIO, torch.float32, math.inf)
    clip = Clip(importance_mask=ImportanceMask(level="sequence", low=0.5, high=2.0))
    ppo = Ppo(estimator="reinforce++", rollouts=8, micro_batch=2, minibatches=2, kl=Kl(coef=0.0), clip=clip,
              reward=Reward(normalise="none"))  # fmt: skip
    tables = []
    for masked in (True, False):
        policy = TablePolicy(STATES, V, state_of)
        m = micro([3, 4], [1.0, 1.0], seed=2)
        m.logprobs = policy(m.input_ids, None, m.is_response)[0].detach()
        m.advantages = torch.where(m.is_response, torch.tensor([[1.0], [-0.5]]), 0.0)
        m.sampler_logprobs = m.logprobs - torch.where(m.is_response, torch.tensor([[0.0], [0.3]]), 0.0)  # r of 3.3
        m.is_weight = importance_weights(clip, m.logprobs, m.sampler_logprobs, m.is_response).weights
        if not masked:
            m.is_weight = torch.where(m.is_response, 1.0, 0.0)
            m.advantages[1] = 0.0
        learner = Learner(ppo, PlainEngine(policy, torch.optim.SGD(policy.parameters(), lr=1.0)), None,
                          RewardScale(ppo.reward, 0.0, 1.0), seed=0)  # fmt: skip
        learner.update([[m]], 1, 0.0)
        tables.append(policy.table.detach().clone())
    assert torch.equal(*tables) and tables[0].abs().sum() > 0


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="accepts no ratio"):
        ImportanceMask(low=2.0, high=2.0)
