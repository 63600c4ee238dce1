"""A learner whose policy and critic are tables, and a rollout of ragged micro-batches for it."""

import torch

from core.config import Clip, Kl, Ppo, Reward
from ppo.records import Micro
from ppo.rewards import RewardScale
from ppo.update import Learner
from tests.builders.plain_engine import PlainEngine, TableCritic, TablePolicy

STATES, V = 4, 5


def state_of(ids: torch.Tensor) -> torch.Tensor:
    return ids % STATES


def micro(lengths: list[int], proxy: list[float], seed: int, columns: int = 7) -> Micro:
    """Responses of these lengths behind a prompt of one token."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (len(lengths), columns), generator=g)
    mask = torch.arange(columns - 1) < torch.tensor(lengths)[:, None]
    rows = torch.arange(len(lengths))
    m = Micro(ids, torch.ones_like(ids), mask, torch.zeros(mask.shape), rows >= 0, rows, rows)
    m.proxy = torch.tensor(proxy)
    m.logprobs, m.ref_logprobs = torch.zeros(mask.shape), torch.zeros(mask.shape)
    return m


def learner(ppo: Ppo, lr: float = 0.0) -> Learner:
    """Policy and critic are tables of small random numbers."""
    policy, critic = TablePolicy(STATES, V, state_of), TableCritic(STATES, state_of)
    g = torch.Generator().manual_seed(9)
    for table in (policy.table, critic.table):
        table.data = torch.randn(table.shape, generator=g)
    actor, values = (
        PlainEngine(module, torch.optim.SGD(module.parameters(), lr=lr), accumulation=2) for module in (policy, critic)
    )
    return Learner(ppo, actor, values, RewardScale(ppo.reward, 0.0, 1.0), seed=0)


PPO = Ppo(
    rollouts=16, micro_batch=2, minibatches=2, kl=Kl(coef=0.0), reward=Reward(normalise="none"),
    clip=Clip(importance_weight=None, value=0.1), critic_head="zero",
)  # fmt: skip


@torch.no_grad()
def rollout(trained: Learner) -> list[list[Micro]]:
    """Two minibatches of two micro-batches that hold 2 to 22 tokens; the old policy is another one than the table."""
    lengths = [[[1, 1], [6, 6, 4, 6]], [[2], [5, 6, 6]]]
    made = [[micro(n, [0.3 * len(n)] * len(n), seed=10 * i + k) for k, n in enumerate(part)]
            for i, part in enumerate(lengths)]  # fmt: skip
    g = torch.Generator().manual_seed(5)
    for m in (m for part in made for m in part):
        now = trained.actor(m.input_ids, None, m.is_response)[0]
        m.logprobs = torch.where(m.is_response, now + 0.3 * torch.randn(now.shape, generator=g), 0.0)
        m.ref_logprobs = m.logprobs
        m.critic_outputs = trained.critic_outputs(m)
        m.critic_outputs += 0.2 * torch.randn(now.shape, generator=g) * m.is_response
    return made


def reported(trained: Learner, minibatches: list[list[Micro]]) -> dict[str, float]:
    found = trained.advantages([m for part in minibatches for m in part], 0.0)
    return found | trained.update(minibatches, 1, 0.0)
