"""Five PPO updates under DeepSpeed on the ranks of torchrun, in several layouts of the same 8 responses a step.

A layout is STAGExMICRO_BATCH, and options of `config.Engine` behind a plus.
"""

import json
import os
import sys
from pathlib import Path

import torch

from core import config
from core.batching import pad_right
from core.training import distributed
from core.training.engine import Engine
from ppo.policy import PolicyModule
from ppo.records import Micro
from ppo.rewards import RewardScale
from ppo.update import Learner
from rm.model import RewardModel
from tests.programs.zero3 import OPTIM, tiny

STEPS, ROWS = 5, 8
PPO = config.Ppo(
    rollouts=ROWS, micro_batch=1, minibatches=1, epochs=2, lam=0.95, kl=config.Kl(coef=0.1),
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


def models() -> tuple[PolicyModule, RewardModel]:
    policy = PolicyModule(tiny(1), 0.8)
    torch.manual_seed(5)
    return policy, RewardModel(tiny(2), "mlp", None, mean=0.5, std=2.0)


def micro_of(rows: list[dict]) -> Micro:
    ids, mask = pad_right([r["ids"] for r in rows], 0)
    is_response = torch.zeros_like(ids, dtype=torch.bool)[:, 1:]
    shift, weight = torch.zeros(is_response.shape), torch.zeros(is_response.shape)
    for b, r in enumerate(rows):
        span = slice(r["prompt"] - 1, len(r["ids"]) - 1)
        is_response[b, span], shift[b, span], weight[b, span] = True, r["ref_shift"], r["weight"]
    proxy, finished = torch.tensor([r["proxy"] for r in rows]), torch.tensor([r["finished"] for r in rows])
    m = Micro(ids, mask, is_response, None, proxy, finished, torch.arange(len(rows)))
    m.ref_logprobs, m.is_weight = shift, weight
    return m


def train(stage: int, micro: int, **options: bool) -> dict:
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    cfg = config.Engine(dtype="float32", zero_stage=stage, overrides=overrides, **options)
    world, rank = distributed.world_size(), distributed.rank()
    per_rank = ROWS // world
    batches = {"micro_batch": micro, "accumulation": per_rank // micro, "optim": OPTIM, "total_steps": 2 * STEPS}
    actor, critic = (Engine(module, cfg, **batches) for module in models())
    scale = RewardScale(PPO.reward, critic.module.mean, critic.module.std)
    learner = Learner(PPO, actor, critic, scale, seed=1)
    metrics = []
    for step in range(1, STEPS + 1):
        mine = rollouts(step)[rank * per_rank :][:per_rank]
        mine.sort(key=lambda r: len(r["ids"]))
        micros = [micro_of(mine[i : i + micro]) for i in range(0, per_rank, micro)]
        with torch.no_grad():
            for m in micros:
                m.logprobs = actor(m.input_ids, m.attention_mask, m.is_response)[0]
                m.ref_logprobs = m.logprobs + m.ref_logprobs
                m.values = learner.values(m)
        metrics.append(learner.advantages(micros, 0.1) | learner.update(micros, step, 0.1))
    weights = {f"{n}.{k}": w for n, e in (("actor", actor), ("critic", critic)) for k, w in e.named_weights(e.module)}
    return {"metrics": metrics, "weights": {k: w.tolist() for k, w in weights.items()}}


def main(out: str, *layouts: str) -> None:
    distributed.init_distributed()
    found = {}
    for layout in layouts:
        shape, *options = layout.split("+")
        found[layout] = train(*map(int, shape.split("x")), **dict.fromkeys(options, True))
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
