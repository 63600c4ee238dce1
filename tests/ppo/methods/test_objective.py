"""Formulas of other papers against loops over tokens that follow the papers' own notation."""

import math

import pytest
import torch

from core.config import Clip, Kl, Ppo, Reward
from ppo import update
from ppo.math import dr_grpo, gae, policy_loss, rloo
from ppo.methods.objective import (
    cispo_loss,
    gspo_loss,
    length_adaptive_lambda,
    loss_denominator,
    overlong_penalty,
)
from ppo.rewards import RewardScale, final_rewards
from ppo.update import Learner
from tests.builders.plain_engine import PlainEngine, TableCritic, TablePolicy
from tests.builders.ppo_tables import STATES, V, micro, state_of

LENGTHS = [1, 6, 3, 4]
B, T = len(LENGTHS), 7
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
LOW, HIGH = 0.1, 0.2


def draws(seed: int, moved: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs with gradient, the old ones, one advantage a response and one a token; NaN outside responses."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    logp = old + moved * torch.randn(B, T, generator=g, dtype=torch.float64)
    of_row = torch.randn(B, generator=g, dtype=torch.float64)
    of_token = torch.randn(B, T, generator=g, dtype=torch.float64)
    hidden = lambda x: torch.where(MASK, x, math.nan)  # noqa: E731
    return hidden(logp).requires_grad_(), hidden(old), hidden(of_row[:, None].expand(B, T)), hidden(of_token)


def tokens_of(x: torch.Tensor) -> list[list[torch.Tensor]]:
    return [[x[i, t] for t in range(n)] for i, n in enumerate(LENGTHS)]


def aggregated(terms: list[list[torch.Tensor]], kind: str, horizon: int) -> torch.Tensor:
    """The formulas of the papers, term by term."""
    if kind == "token-mean":
        return sum(sum(row) for row in terms) / sum(len(row) for row in terms)
    if kind == "sequence-mean-token-mean":
        return sum(sum(row) / len(row) for row in terms) / len(terms)
    return sum(sum(row) / horizon for row in terms) / len(terms)


AGGREGATIONS = ["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm"]


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_aggregations_are_those_of_the_papers_and_add_up_over_micro_batches(kind):
    logp, old, _, advantages = draws(1)
    terms = [
        [-torch.minimum((l - o).exp() * a, (l - o).exp().clamp(1 - LOW, 1 + HIGH) * a) for l, o, a in zip(*rows)]  # noqa: B905, E741
        for rows in zip(tokens_of(logp), tokens_of(old), tokens_of(advantages), strict=True)
    ]
    (expected,) = torch.autograd.grad(aggregated(terms, kind, horizon=9), logp)
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 4)):  # micro-batches of one minibatch
        mask = MASK[part]
        share = loss_denominator(kind, mask, tokens=sum(LENGTHS), sequences=B, horizon=9)
        loss, _ = policy_loss(logp[part], old[part], advantages[part], mask, LOW, HIGH, loss_denominator=share)
        total = total + loss
    assert float(total.detach()) == pytest.approx(float(aggregated(terms, kind, horizon=9).detach()))
    (found,) = torch.autograd.grad(total, logp)
    torch.testing.assert_close(torch.where(MASK, found, 0.0), torch.where(MASK, expected, 0.0))
    assert not found[~MASK].any()


def test_gspo_is_a_mean_over_responses_of_clipped_sequence_ratios():
    """Eq. 5, with s_i of eq. 7 and its whole gradient, where all tokens of a response have one advantage."""
    clipped = 0.0
    for seed in range(6):
        logp, old, advantages, _ = draws(seed)
        gains = []
        for i, n in enumerate(LENGTHS):
            ratio = torch.stack([logp[i, t] - old[i, t] for t in range(n)]).sum().exp() ** (1 / n)
            gains.append(torch.minimum(ratio * advantages[i, 0], ratio.clamp(1 - LOW, 1 + HIGH) * advantages[i, 0]))
        share = loss_denominator("sequence-mean-token-mean", MASK, tokens=sum(LENGTHS), sequences=B, horizon=9)
        found, stats = gspo_loss(
            logp, old, advantages, MASK, LOW, HIGH, denominator=sum(LENGTHS), loss_denominator=share
        )  # fmt: skip
        torch.testing.assert_close(found, -sum(gains) / B)
        gradients = [torch.autograd.grad(loss, logp)[0] for loss in (found, -sum(gains) / B)]
        torch.testing.assert_close(*(torch.where(MASK, g, 0.0) for g in gradients))
        clipped += float(stats["clipfrac"])
    assert clipped > 0


def test_gspo_token_keeps_the_advantages_of_tokens():
    """Eqs. 13 and 14: sg[s_i] * pi / sg[pi], so that the gradient of a token has its own advantage."""
    logp, old, _, advantages = draws(3, moved=0.01)  # nothing is clipped
    share = loss_denominator("sequence-mean-token-mean", MASK, tokens=sum(LENGTHS), sequences=B, horizon=9)
    loss, _ = gspo_loss(logp, old, advantages, MASK, LOW, HIGH, loss_denominator=share)
    (found,) = torch.autograd.grad(loss, logp)
    for i, n in enumerate(LENGTHS):
        s = math.exp(sum(float((logp - old).detach()[i, t]) for t in range(n)) / n)
        for t in range(n):
            assert float(found[i, t]) == pytest.approx(-s * float(advantages[i, t]) / n / B)


def test_cispo_weighs_log_probs_by_clipped_ratios():
    """Eqs. 4 and 5: value and gradient token by token; no token loses its gradient."""
    logp, old, _, advantages = draws(4)
    loss, stats = cispo_loss(logp, old, advantages, MASK, LOW, HIGH, denominator=sum(LENGTHS))
    (found,) = torch.autograd.grad(loss, logp)
    value, clipped = 0.0, 0
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            ratio = math.exp(float(logp[i, t] - old[i, t]))
            weight = min(max(ratio, 1 - LOW), 1 + HIGH)
            clipped += weight != ratio
            value -= weight * float(advantages[i, t]) * float(logp[i, t]) / sum(LENGTHS)
            gradient = -weight * float(advantages[i, t]) / sum(LENGTHS)
            assert float(found[i, t]) == pytest.approx(gradient) and gradient != 0
    assert float(loss.detach()) == pytest.approx(value) and 0 < clipped < sum(LENGTHS)
    assert float(stats["clipfrac"]) == pytest.approx(clipped / sum(LENGTHS))
    ppo, _ = policy_loss(logp, old, advantages, MASK, LOW, HIGH)
    assert (torch.autograd.grad(ppo, logp)[0][MASK] == 0).any()  # PPO's clip takes some away


def test_without_a_step_all_objectives_have_the_policy_gradient():
    """At the old policy the gradient is that of -mean A log pi, whatever is clipped later."""
    _, old, advantages, _ = draws(5)
    gradients = []
    for loss in (policy_loss, gspo_loss, cispo_loss):
        logp = old.clone().requires_grad_()
        share = loss_denominator("sequence-mean-token-mean", MASK, tokens=sum(LENGTHS), sequences=B, horizon=9)
        gradients.append(
            torch.autograd.grad(loss(logp, old, advantages, MASK, LOW, HIGH, loss_denominator=share)[0], logp)[0]
        )
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0])
    assert float(gradients[0][1, 0]) == pytest.approx(-float(advantages[1, 0]) / LENGTHS[1] / B)


def test_dr_grpo_subtracts_the_mean_of_the_prompt_and_divides_by_nothing():
    returns, groups = torch.tensor([1.0, 0.0, 0.0, 5.0, 7.0]), torch.tensor([3, 3, 3, 8, 8])
    assert dr_grpo(returns, groups).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, -1.0, 1.0])
    sizes = torch.tensor([3, 3, 3, 2, 2])
    torch.testing.assert_close(dr_grpo(returns, groups), rloo(returns, groups) * (sizes - 1) / sizes)


def test_lambda_of_a_length_makes_gaes_coefficients_sum_to_alpha_times_it():
    """The coefficients 1, lambda, lambda^2, ... of an endless response; 0 where alpha times the length is below 1."""
    lengths = [1, 20, 50, 400]
    mask = torch.arange(400) < torch.tensor(lengths)[:, None]
    found = length_adaptive_lambda(mask, 0.05)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.6, 0.95])
    for lam, length in list(zip(found.double().tolist(), lengths, strict=True))[2:]:
        assert sum(lam**k for k in range(2000)) == pytest.approx(0.05 * length, rel=1e-5)


def deltas_summed(rewards, values, gamma, lam) -> list[float]:
    """GAE as a double sum over the rest of one response."""
    n, v = len(rewards), [*values, 0.0]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("options", [{"critic_lam": 1.0}, {"lam_alpha": 0.5}, {"lam_alpha": 0.5, "critic_lam": 0.9}])
def test_policy_and_critic_have_a_lambda_each(options):
    """VC-PPO: advantages by the policy's lambda, returns by the critic's; VAPO: the policy's follows the length."""
    reward = Reward(normalise="none", clip=None)
    ppo = Ppo(reward=reward, kl=Kl(coef=0.0), whiten_advantages=False, lam=0.7, gamma=0.9, **options)
    m = micro([1, 6, 3], [2.0, -1.0, 0.5], seed=3)
    m.critic_outputs = torch.randn(m.is_response.shape, generator=torch.Generator().manual_seed(1))
    module = TableCritic(STATES, state_of)
    critic = PlainEngine(module, torch.optim.SGD(module.parameters(), lr=0.0))
    Learner(ppo, None, critic, RewardScale(ppo.reward, 0.0, 1.0), seed=0).advantages([m], 0.0)
    for i, n in enumerate([1, 6, 3]):
        values = [float(m.critic_outputs[i, t]) for t in range(n)]
        rewards = [0.0] * (n - 1) + [float(m.proxy[i])]
        lam = max(0.0, 1 - 1 / (0.5 * n)) if "lam_alpha" in options else 0.7
        critic_lam = options.get("critic_lam", lam)
        assert m.advantages[i, :n].tolist() == pytest.approx(deltas_summed(rewards, values, 0.9, lam), abs=1e-5)
        returns = [a + v for a, v in zip(deltas_summed(rewards, values, 0.9, critic_lam), values, strict=True)]
        assert m.returns[i, :n].tolist() == pytest.approx(returns, abs=1e-5)
        if options.get("critic_lam") == 1.0:  # the discounted reward, whatever the critic says
            assert returns == pytest.approx([rewards[-1] * 0.9 ** (n - 1 - t) for t in range(n)])


def test_one_lambda_for_all_rows_is_that_of_each_row():
    g = torch.Generator().manual_seed(7)
    rewards, values = torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    for whole, rows in zip(gae(rewards, values, MASK, 0.9, 0.6), gae(rewards, values, MASK, 0.9, torch.full((B,), 0.6)),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(whole, rows)


def test_the_overlong_buffer_by_hand():
    """DAPO's numbers, smaller: 20 tokens at most, the last 4 of them a buffer."""
    tokens = torch.tensor([1, 16, 17, 18, 20])
    assert overlong_penalty(tokens, 20, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]
    cfg = Reward(overlong_buffer=4, overlong_weight=2.0, clip=1.0)
    found = final_rewards(cfg, torch.full((5,), 3.0), torch.ones(5, dtype=torch.bool), tokens, longest=20)
    assert found.tolist() == [1.0, 1.0, 0.5, 0.0, -1.0]  # after the clip, which would hide it


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_an_update_takes_the_gradient_of_the_whole_minibatch(monkeypatch, objective, kind):
    """Over micro-batches of other sizes and lengths, with the KL in the loss too: a step of SGD from one graph."""
    if objective == "gspo" and kind != "sequence-mean-token-mean":
        with pytest.raises(ValueError, match="gspo averages over responses"):
            Ppo(objective=objective, loss_aggregation=kind)
        return
    monkeypatch.setitem(update.FIRST_RATIO, torch.float32, math.inf)  # the old policy is another one on purpose
    ppo = Ppo(
        estimator="reinforce++", objective=objective, loss_aggregation=kind, rollouts=16, micro_batch=2, minibatches=2,
        kl=Kl(coef=0.3, where="loss"), clip=Clip(importance_weight=None, low=LOW, high=HIGH),
        reward=Reward(normalise="none"),
    )  # fmt: skip
    policy = TablePolicy(STATES, V, state_of)
    g = torch.Generator().manual_seed(9)
    policy.table.data = torch.randn(policy.table.shape, generator=g)
    micros = [micro([1], [1.0], seed=1), micro([6, 2, 4], [0.5, -1.0, 2.0], seed=2)]
    for m in micros:
        noise = lambda: 0.2 * torch.randn(m.is_response.shape, generator=g)  # noqa: B023, E731
        now = policy(m.input_ids, None, m.is_response)[0].detach()
        m.logprobs, m.ref_logprobs = (torch.where(m.is_response, now + noise(), 0.0) for _ in range(2))
        m.advantages = torch.where(m.is_response, torch.randn(len(m.rows), 1, generator=g), 0.0)
    before = policy.table.detach().clone()
    engine = PlainEngine(policy, torch.optim.SGD(policy.parameters(), lr=1.0), accumulation=2)
    learner = Learner(ppo, engine, None, RewardScale(ppo.reward, 0.0, 1.0), seed=0, longest=9)
    learner.update([micros], 1, 0.3)
    table = before.clone().requires_grad_()
    terms = []
    for m in micros:
        logp = table[state_of(m.input_ids)[:, :-1]].log_softmax(-1).gather(-1, m.input_ids[:, 1:, None]).squeeze(-1)
        for b, n in enumerate(m.is_response.sum(-1).tolist()):
            row, old, ref, adv = logp[b, :n], m.logprobs[b, :n], m.ref_logprobs[b, :n], m.advantages[b, 0]
            ratio = (row - old).exp()
            if objective == "gspo":
                ratio = (row - old).mean().exp().expand(n)
            gain = torch.minimum(ratio * adv, ratio.clamp(1 - LOW, 1 + HIGH) * adv)
            if objective == "cispo":
                gain = ratio.clamp(1 - LOW, 1 + HIGH).detach() * adv * row
            terms.append(list(-gain + 0.3 * 0.5 * (row - ref) ** 2))
    (gradient,) = torch.autograd.grad(aggregated(terms, kind, horizon=9), table)
    torch.testing.assert_close(policy.table.detach(), before - gradient, atol=1e-6, rtol=1e-4)
