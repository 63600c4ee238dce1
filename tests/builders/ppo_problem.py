"""Three PPO steps of 16 responses in two minibatches, and the models that they start from."""

import random

import torch

from core import config
from core.data.streams import stream_seed
from ppo.policy import PolicyModule
from rm.model import RewardModel
from tests.builders.tiny_lm import OPTIM, tiny_lm

STEPS, ROWS = 3, 16
SEED = 1
PPO = config.Ppo(
    rollouts=ROWS, micro_batch=1, minibatches=2, epochs=2, lam=0.95, kl=config.Kl(coef=0.1),
    clip=config.Clip(importance_weight=2.0), actor=OPTIM, critic=OPTIM, critic_head="reward", entropy_coef=0.01,
)  # fmt: skip


def rollouts(step: int) -> list[dict]:
    """Responses of 2 to 9 tokens behind prompts of 1 to 5, with what a rollout knows of them."""
    g = torch.Generator().manual_seed(100 + step)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=g))  # noqa: E731
    rows = []
    for _ in range(ROWS):
        prompt, response = draw(1, 6), draw(2, 10)
        rows.append({
            "ids": torch.randint(1, 64, (prompt + response,), generator=g).tolist(), "prompt": prompt,
            "ref_shift": 0.3 * torch.randn(response, generator=g), "weight": torch.rand(response, generator=g) + 0.5,
            "proxy": float(torch.randn(1, generator=g)), "finished": draw(0, 2) == 1,
        })  # fmt: skip
    return rows


def minibatch_of(row: int) -> int:
    """Which minibatch a row of `rollouts` belongs to: on one rank and on two, each has half of a rank's rows."""
    return row % PPO.minibatches


def order(step: int, epoch: int) -> list[int]:
    """The minibatches in the order in which `ppo.update.Learner` with SEED takes them."""
    rng = random.Random(stream_seed(SEED, "ppo", "minibatches", step, epoch))
    return rng.sample(range(PPO.minibatches), PPO.minibatches)


def models() -> tuple[PolicyModule, RewardModel]:
    policy = PolicyModule(tiny_lm(1), 0.8)
    torch.manual_seed(5)
    return policy, RewardModel(tiny_lm(2), "mlp", None, mean=0.5, std=2.0)
