"""PPO as a whole on a problem so small that its optimum pi_0 exp(r / beta) / Z is known.

A response is one token that ends it, or two tokens: lengths are ragged, and a minibatch of one length would not do.
"""

import pytest
import torch

from core.config import Clip, Kl, Ppo, Reward
from ppo.records import Micro
from ppo.rewards import RewardScale
from ppo.update import Learner
from tests.builders.plain_engine import PlainEngine, TableCritic, TablePolicy

pytestmark = pytest.mark.slow

PROMPTS, V = 2, 3
END = 0
RESPONSES = [[END], *([a, b] for a in range(1, V) for b in range(V))]
STEPS, BOUND, ROWS = 200, 0.04, 512


def state_of(ids: torch.Tensor) -> torch.Tensor:
    """[B, 3] columns (prompt, first, second token) -> the state in which the next token is chosen."""
    prompt, first = ids[:, 0], ids[:, 1]
    start = prompt * (1 + V)
    return torch.stack([start, start + 1 + first, torch.zeros_like(start)], dim=1)


def conversations() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [prompts * responses, 3] of every prompt with every response, and which of [.., 2] are response tokens."""
    rows = [[prompt, *response] + [0] * (2 - len(response)) for prompt in range(PROMPTS) for response in RESPONSES]
    mask = [[True, len(response) == 2] for _ in range(PROMPTS) for response in RESPONSES]
    return torch.tensor(rows), torch.tensor(mask)


def sequence_probabilities(policy: TablePolicy) -> torch.Tensor:
    """[prompts, responses]"""
    ids, mask = conversations()
    return policy(ids, None, mask)[0].sum(-1).exp().view(PROMPTS, -1)


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
    prior = sequence_probabilities(reference)
    if where == "reward":
        best = prior * (rewards / beta).exp()
        return best / best.sum(-1, keepdim=True)
    longer, r = prior[:, 1:].view(PROMPTS, V - 1, V), rewards[:, 1:].view(PROMPTS, V - 1, V)
    second = longer / longer.sum(-1, keepdim=True) * (r / beta).exp()
    second /= second.sum(-1, keepdim=True)
    end = prior[:, :1] * (rewards[:, :1] / beta).exp()
    first = longer.sum(-1) * ((second * r).sum(-1) / beta).exp()
    best = torch.cat([end, (first[..., None] * second).flatten(1)], dim=1)
    return best / best.sum(-1, keepdim=True)


def train(beta: float, estimator: str, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained policy and the optimum, [prompts, responses] each."""
    generator, rewards, reference = problem()
    policy = TablePolicy(PROMPTS * (1 + V), V, state_of)
    policy.load_state_dict(reference.state_dict())
    k = 1 if estimator in ("gae", "reinforce++") else 4
    ppo = Ppo(
        estimator=estimator, samples_per_prompt=k, rollouts=ROWS, micro_batch=ROWS // 4, minibatches=2,
        kl=Kl(coef=beta, where=where), whiten_advantages=False, lam=1.0, clip=Clip(value=None, importance_weight=None),
        reward=Reward(normalise="none", clip=None),
    )  # fmt: skip
    actor = PlainEngine(policy, torch.optim.Adam(policy.parameters(), lr=0.05), accumulation=2)
    critic = None
    if estimator == "gae":
        values = TableCritic(PROMPTS * (1 + V), state_of)
        critic = PlainEngine(values, torch.optim.Adam(values.parameters(), lr=0.1), accumulation=2)
    learner = Learner(ppo, actor, critic, RewardScale(ppo.reward, 0.0, 1.0), seed=0)
    for step in range(1, STEPS + 1):
        actor.optimizer.param_groups[0]["lr"] = 0.05 * (1 - (step - 1) / STEPS)
        minibatches = rollout(ppo, policy, reference, rewards, step, generator)
        micros = [m for minibatch in minibatches for m in minibatch]
        for m in micros if learner.critic else ():
            m.critic_outputs = learner.critic_outputs(m).detach()
        learner.advantages(micros, beta)
        learner.update(minibatches, step, beta)
    with torch.no_grad():
        return sequence_probabilities(policy), optimum(rewards, reference, beta, where)


@torch.no_grad()
def rollout(ppo: Ppo, policy, reference, rewards, step: int, generator) -> list[list[Micro]]:
    """Two minibatches of random rows, each in a micro-batch of its shorter and one of its longer half."""
    groups = torch.arange(ROWS // ppo.samples_per_prompt).repeat_interleave(ppo.samples_per_prompt)
    prompts = groups % PROMPTS
    which = torch.multinomial(sequence_probabilities(policy)[prompts], 1, generator=generator).squeeze(-1)
    ids, mask = (x.view(PROMPTS, len(RESPONSES), -1)[prompts, which] for x in conversations())
    made = []
    for rows in torch.randperm(ROWS, generator=generator).chunk(ppo.minibatches):
        by_length = rows[mask[rows].sum(-1).argsort()]
        minibatch = []
        for part in by_length.chunk(2):
            finished = torch.ones(len(part), dtype=torch.bool)
            m = Micro(ids[part], torch.ones_like(ids[part]), mask[part], None, finished, groups[part], part)
            m.proxy = rewards[prompts[part], which[part]]
            m.logprobs, m.ref_logprobs = (lm(m.input_ids, None, m.is_response)[0] for lm in (policy, reference))
            minibatch.append(m)
        made.append(minibatch)
    return made


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
        ("dr_grpo", "reward", 0.5),
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
