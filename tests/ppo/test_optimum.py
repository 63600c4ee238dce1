"""PPO as a whole on a problem so small that its optimum pi_0 exp(r / beta) / Z is known."""

import itertools

import pytest
import torch

from core.config import Clip, Kl, Ppo, Reward
from ppo.records import Micro
from ppo.rewards import RewardScale
from ppo.update import Learner
from tests.builders.plain_engine import PlainEngine, TableCritic, TablePolicy

pytestmark = pytest.mark.slow

PROMPTS, V, T = 2, 3, 2
STEPS, BOUND = 200, 0.04
RESPONSES = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [9, 2]


def state_of(ids: torch.Tensor) -> torch.Tensor:
    """[B, 1 + T] columns (prompt, first, second token) -> the state in which the next token is chosen."""
    prompt, first = ids[:, 0], ids[:, 1]
    start = prompt * (1 + V)
    return torch.stack([start, start + 1 + first, torch.zeros_like(start)], dim=1)


def sequence_probabilities(policy: TablePolicy) -> torch.Tensor:
    """[prompts, responses]"""
    rows = torch.stack([torch.cat([torch.tensor([p]), r]) for p in range(PROMPTS) for r in RESPONSES])
    mask = torch.ones(len(rows), T, dtype=torch.bool)
    return policy(rows, None, mask)[0].sum(-1).exp().view(PROMPTS, -1)


def problem(seed: int = 0) -> tuple[torch.Generator, torch.Tensor, TablePolicy]:
    """A generator, rewards [prompts, responses] and a reference."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(PROMPTS, len(RESPONSES), generator=generator)
    reference = TablePolicy(PROMPTS * (1 + V), V, state_of)
    reference.table.data = 0.7 * torch.randn(reference.table.shape, generator=generator)
    return generator, rewards, reference


@torch.no_grad()
def optimum(rewards: torch.Tensor, reference: TablePolicy, beta: float, where: str) -> torch.Tensor:
    """[prompts, responses].

    With KL in the loss, the KL of a token does not count for the tokens before it. The first token is then chosen by
    the mean reward of what follows, not by its soft maximum.
    """
    prior = sequence_probabilities(reference).view(PROMPTS, V, V)
    r = rewards.view(PROMPTS, V, V)
    if where == "reward":
        best = (prior * (r / beta).exp()).view(PROMPTS, -1)
        return best / best.sum(-1, keepdim=True)
    first = prior.sum(-1)
    second = (prior / first[..., None]) * (r / beta).exp()
    second /= second.sum(-1, keepdim=True)
    first = first * ((second * r).sum(-1) / beta).exp()
    return (first[..., None] / first.sum(-1)[:, None, None] * second).view(PROMPTS, -1)


def train(beta: float, estimator: str, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained policy and the optimum, [prompts, responses] each."""
    generator, rewards, reference = problem()
    policy = TablePolicy(PROMPTS * (1 + V), V, state_of)
    policy.load_state_dict(reference.state_dict())
    k = 1 if estimator in ("gae", "reinforce++") else 4
    ppo = Ppo(
        estimator=estimator, samples_per_prompt=k, rollouts=512, micro_batch=512, minibatches=1, epochs=2,
        kl=Kl(coef=beta, where=where), whiten_advantages=False, lam=1.0, clip=Clip(value=None, importance_weight=None),
        reward=Reward(normalise="none", clip=None),
    )  # fmt: skip
    actor = PlainEngine(policy, torch.optim.Adam(policy.parameters(), lr=0.05))
    critic = None
    if estimator == "gae":
        values = TableCritic(PROMPTS * (1 + V), state_of)
        critic = PlainEngine(values, torch.optim.Adam(values.parameters(), lr=0.1))
    learner = Learner(ppo, actor, critic, RewardScale(ppo.reward, 0.0, 1.0), seed=0)
    for step in range(1, STEPS + 1):
        actor.optimizer.param_groups[0]["lr"] = 0.05 * (1 - (step - 1) / STEPS)
        learner_step(learner, policy, reference, rewards, k, step, beta, generator)
    with torch.no_grad():
        return sequence_probabilities(policy), optimum(rewards, reference, beta, where)


def learner_step(learner, policy, reference, rewards, k, step, beta, generator) -> None:
    groups = torch.arange(512 // k).repeat_interleave(k)
    prompts = groups % PROMPTS
    mask = torch.ones(512, T, dtype=torch.bool)
    with torch.no_grad():
        which = torch.multinomial(sequence_probabilities(policy)[prompts], 1, generator=generator).squeeze(-1)
        ids = torch.cat([prompts[:, None], RESPONSES[which]], dim=1)
        m = Micro(ids, torch.ones_like(ids), mask, None, rewards[prompts, which], torch.ones(512, dtype=bool), groups)
        m.logprobs, m.ref_logprobs = (lm(ids, None, mask)[0] for lm in (policy, reference))
        if learner.critic:
            m.values = learner.values(m)
    learner.advantages([m], beta)
    learner.update([m], step, beta)


def variation(p: torch.Tensor, q: torch.Tensor) -> float:
    """The largest total variation distance over prompts."""
    return float(0.5 * (p - q).abs().sum(-1).max())


@pytest.mark.parametrize(
    ("estimator", "where", "beta"),
    [
        ("gae", "reward", 0.5),
        ("gae", "reward", 2.0),
        ("gae", "loss", 0.5),
        ("rloo", "reward", 0.5),
        ("reinforce++", "reward", 0.5),
    ],
)
def test_the_optimum_is_reached(estimator, where, beta):
    assert variation(*train(beta, estimator, where)) < BOUND


def test_the_bound_separates_kl_coefficients_and_places():
    _, rewards, reference = problem()
    right = optimum(rewards, reference, 0.5, "reward")
    for other in (
        sequence_probabilities(reference).detach(),
        optimum(rewards, reference, 1.0, "reward"),
        optimum(rewards, reference, 0.5, "loss"),
    ):
        assert variation(right, other) > 2 * BOUND
