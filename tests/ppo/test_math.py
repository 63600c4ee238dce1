"""Every function of ppo.math against a loop, an enumeration or a number computed by hand."""

import math

import numpy as np
import pytest
import torch

from ppo.math import (
    AdaptiveKL,
    clustered_se,
    exact_kl,
    explained_variance,
    gae,
    grpo,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_loss,
    logprobs,
    masked_mean,
    masked_whiten,
    policy_loss,
    reward_to_go,
    rloo,
    shaped_rewards,
    value_loss,
)
from tests.builders.processes import run_program

B, T = 3, 6
# Responses begin and end at different columns, as they do after prompts of different lengths.
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)


def poison(x: torch.Tensor, value: float) -> torch.Tensor:
    return torch.where(MASK, x, value)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.99, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    rewards, values = torch.randn(B, T), torch.randn(B, T)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for b in range(B):
        columns = MASK[b].nonzero().flatten().tolist()
        r, v = rewards[b, columns].tolist(), [*values[b, columns].tolist(), 0.0]
        for t in range(len(r)):
            expected = sum((gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(len(r) - t))
            assert advantages[b, columns[t]] == pytest.approx(expected, abs=1e-5)
            assert returns[b, columns[t]] == pytest.approx(expected + v[t], abs=1e-5)
    assert (advantages[~MASK] == 0).all() and (returns[~MASK] == 0).all()


def test_returns_are_reward_to_go_without_discount():
    rewards = torch.randn(B, T)
    _, returns = gae(rewards, torch.randn(B, T), MASK, 1.0, 1.0)
    for b in range(B):
        for t in MASK[b].nonzero().flatten().tolist():
            assert returns[b, t] == pytest.approx(float(rewards[b, t:][MASK[b, t:]].sum()), abs=1e-5)


def test_shaped_rewards_put_the_score_on_the_last_token():
    kl = torch.randn(B, T)
    rewards = shaped_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, MASK, 0.1)
    expected = torch.where(MASK, -0.1 * kl, 0.0)
    for b, (column, score) in enumerate(((4, 1.0), (5, 2.0), (1, 3.0))):
        expected[b, column] += score
    torch.testing.assert_close(rewards, expected)


def test_kl_estimators_against_enumeration():
    """Expectations over all tokens of a small vocabulary, so nothing is sampled."""
    logits, ref = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    p, q = logits.softmax(0), ref.softmax(0)
    truth = float((p * (p / q).log()).sum())
    assert float(exact_kl(logits, ref)) == pytest.approx(truth, abs=1e-6)
    logp, ref_logp = p.log(), q.log()
    assert float((p * kl_k1(logp, ref_logp)).sum()) == pytest.approx(truth, abs=1e-12)
    assert float((p * kl_k3(logp, ref_logp)).sum()) == pytest.approx(truth, abs=1e-12)
    assert (kl_k3(logp, ref_logp) >= 0).all() and (kl_k1(logp, ref_logp) < 0).any()
    assert abs(float((p * kl_k2(logp, ref_logp)).sum()) - truth) > 1e-3  # biased


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_against_numpy(temperature):
    logits, tokens = torch.randn(2, 3, 11, dtype=torch.float16), torch.randint(0, 11, (2, 3))
    x = logits.numpy().astype(np.float64) / temperature
    expected = np.take_along_axis(x, tokens.numpy()[..., None], -1)[..., 0] - np.log(np.exp(x).sum(-1))
    found = logprobs(logits, tokens, temperature)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), 1e9])
def test_masked_positions_change_nothing(bad):
    old, adv, values, returns, weight = (torch.randn(B, T) for _ in range(5))
    for fill in (0.0, bad):
        logp = poison(old + 0.1, fill).requires_grad_()
        new_values = poison(values + 0.3, fill).requires_grad_()
        ploss, stats = policy_loss(
            logp, poison(old, fill), poison(adv, fill), MASK, 0.2, 0.2, is_weight=poison(weight.abs(), fill)
        )
        vloss, _ = value_loss(new_values, poison(values, fill), poison(returns, fill), MASK, 0.2)
        (ploss + vloss).backward()
        advantages, targets = gae(poison(adv, fill), poison(values, fill), MASK, 1.0, 0.95)
        parts = [ploss.detach(), vloss.detach(), logp.grad, new_values.grad, advantages, targets, stats["clipfrac"]]
        parts += [masked_whiten(poison(adv, fill), MASK), masked_mean(poison(adv, fill), MASK)]
        parts += [shaped_rewards(torch.ones(B), poison(adv, fill), MASK, 0.1)]
        if fill == 0.0:
            clean = parts
    for a, b in zip(clean, parts, strict=True):
        assert torch.equal(a, b)
    assert (parts[2][~MASK] == 0).all()


def test_on_policy_loss_is_the_policy_gradient():
    logits = torch.randn(B, T, 5, requires_grad=True)
    tokens, adv = torch.randint(0, 5, (B, T)), torch.randn(B, T)
    logp = logprobs(logits, tokens)
    loss, stats = policy_loss(logp, logp.detach(), adv, MASK, 0.2, 0.2)
    assert float(loss.detach()) == pytest.approx(-float(adv[MASK].mean()), abs=1e-6)
    assert (float(stats["clipfrac"]), float(stats["approx_kl"]), float(stats["ratio_max_dev"])) == (0.0, 0.0, 0.0)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (vanilla,) = torch.autograd.grad(-(logp * adv)[MASK].mean(), logits)
    torch.testing.assert_close(gradient, vanilla)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "clipped"),
    [(1.5, 2.0, 1.3 * 2.0, 1), (0.5, 2.0, 0.5 * 2.0, 0), (0.5, -2.0, 0.8 * -2.0, 1), (1.5, -2.0, 1.5 * -2.0, 0)],
)
def test_clipping_by_hand(ratio, advantage, gain, clipped):
    one = torch.ones(1, 1, dtype=torch.bool)
    logp = torch.tensor([[math.log(ratio)]])
    loss, stats = policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), one, 0.2, 0.3)
    assert float(loss) == pytest.approx(-gain, rel=1e-6)
    assert float(stats["clipfrac"]) == clipped


def test_dual_clip_bounds_negative_advantages():
    one = torch.ones(1, 1, dtype=torch.bool)
    args = (torch.tensor([[math.log(9.0)]]), torch.zeros(1, 1), torch.tensor([[-2.0]]), one, 0.2, 0.2)
    assert float(policy_loss(*args)[0]) == pytest.approx(18.0, rel=1e-5)
    assert float(policy_loss(*args, dual_clip=3.0)[0]) == pytest.approx(6.0, rel=1e-5)


def test_micro_batches_add_up_to_the_global_token_mean():
    old, adv, values, returns = (torch.randn(B, T) for _ in range(4))
    logp, count = old + 0.3 * torch.randn(B, T), float(MASK.sum())
    rows = [slice(0, 1), slice(1, 3)]
    whole = policy_loss(logp, old, adv, MASK, 0.2, 0.2)[0]
    parts = [policy_loss(logp[r], old[r], adv[r], MASK[r], 0.2, 0.2, denominator=count)[0] for r in rows]
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-6)
    whole = value_loss(values, old, returns, MASK, 0.2)[0]
    parts = [value_loss(values[r], old[r], returns[r], MASK[r], 0.2, denominator=count)[0] for r in rows]
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-6)


def test_value_loss_by_hand():
    one = torch.ones(1, 2, dtype=torch.bool)
    # first: moved 1 towards the target, clipped at 0.2: (0.2 - 3)^2 counts; second: unmoved, (1 - 0)^2
    loss, clipfrac = value_loss(
        torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]]), one, 0.2
    )
    assert float(loss) == pytest.approx(0.5 * (2.8**2 + 1) / 2, rel=1e-6)
    assert float(clipfrac) == 0.5


def test_whitening():
    x = torch.randn(B, T) * 3 + 5
    white = masked_whiten(x, MASK)
    assert float(white[MASK].mean()) == pytest.approx(0, abs=1e-5)
    assert float(white[MASK].var(correction=0)) == pytest.approx(1, abs=1e-4)
    kept = masked_whiten(x, MASK, shift_mean=False)
    assert float(kept[MASK].mean()) == pytest.approx(float(x[MASK].mean()), abs=1e-4)


@pytest.mark.slow
def test_whitening_on_two_ranks_is_that_of_the_concatenation():
    assert run_program("tests/programs/whiten.py", ranks=2).count("equal") == 2


def test_explained_variance():
    returns = torch.randn(B, T)
    assert float(explained_variance(returns, returns, MASK)) == 1.0
    assert float(explained_variance(torch.full((B, T), 4.0), returns, MASK)) == pytest.approx(0, abs=1e-5)


def test_clustered_se():
    values = [1.0, 3.0, 2.0, 6.0, 5.0, 7.0]
    assert clustered_se(values, range(6)) == pytest.approx(np.std(values, ddof=1) / 6**0.5)
    # equal clusters: the error of the mean of their means, 2, 4 and 6
    assert clustered_se(values, "aabbcc") == pytest.approx(np.std([2.0, 4.0, 6.0], ddof=1) / 3**0.5)
    # by hand: the mean is 4, the sums of the deviations of a and b are -6 and 6
    assert clustered_se(values, "aaabbb") == pytest.approx((2 * (36 + 36)) ** 0.5 / 6)
    assert clustered_se(values, "aaaaaa") == clustered_se(values, range(6))


def test_the_error_of_clusters_is_the_spread_of_means():
    """Means of 8 samples of each of 6 to 10 prompts, drawn 4,000 times."""
    rng, means, errors = np.random.default_rng(0), [], []
    for _ in range(4000):
        prompts = np.repeat(np.arange(rng.integers(6, 11)), 8)
        values = rng.normal(size=10)[prompts] + rng.normal(size=len(prompts))
        means.append(values.mean())
        errors.append(clustered_se(values.tolist(), prompts.tolist()))
    assert np.mean(np.square(errors)) == pytest.approx(np.var(means), rel=0.05)


def test_adaptive_kl_by_hand():
    kl = AdaptiveKL(0.1, target=2.0, horizon=1000)
    kl.update(2.2, n=100)  # error 0.1
    assert kl.coef == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000))
    kl.update(99.0, n=100)  # error clipped to 0.2
    assert kl.coef == pytest.approx(0.1 * 1.01 * 1.02)
    other = AdaptiveKL(1.0, None, 1)
    other.load_state_dict(kl.state_dict())
    other.update(50.0, n=10)
    assert other.coef == kl.coef  # without a target it is fixed


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
