"""Three PPO steps under DeepSpeed on the ranks of torchrun, in several layouts of the same 16 responses a step.

A layout is STAGExMICRO_BATCH, and options of `config.Engine` behind a plus.
"""

import json
import os
import sys
from pathlib import Path

import torch

from core import config
from core.batching import balanced, pad_right
from core.training import distributed
from core.training.engine import Engine
from ppo.records import Micro
from ppo.rewards import RewardScale
from ppo.update import Learner
from tests.builders.ppo_problem import PPO, ROWS, SEED, STEPS, minibatch_of, models, rollouts
from tests.builders.tiny_lm import OPTIM


def micro_of(rows: list[dict]) -> Micro:
    ids, mask = pad_right([r["ids"] for r in rows], 0)
    is_response = torch.zeros_like(ids, dtype=torch.bool)[:, 1:]
    shift, weight = torch.zeros(is_response.shape), torch.zeros(is_response.shape)
    for b, r in enumerate(rows):
        span = slice(r["prompt"] - 1, len(r["ids"]) - 1)
        is_response[b, span], shift[b, span], weight[b, span] = True, r["ref_shift"], r["weight"]
    finished, numbers = torch.tensor([r["finished"] for r in rows]), torch.arange(len(rows))
    m = Micro(ids, mask, is_response, None, finished, numbers, numbers)
    m.proxy = torch.tensor([r["proxy"] for r in rows])
    m.ref_logprobs, m.is_weight = shift, weight
    return m


def train(stage: int, micro: int, **options: bool) -> dict:
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    cfg = config.Engine(dtype="float32", zero_stage=stage, overrides=overrides, **options)
    world, rank = distributed.world_size(), distributed.rank()
    per_rank = ROWS // world
    passes = per_rank // (micro * PPO.minibatches)
    batches = {"micro_batch": micro, "accumulation": passes, "optim": OPTIM, "total_steps": 4 * STEPS}
    actor, critic = (Engine(module, cfg, **batches) for module in models())
    scale = RewardScale(PPO.reward, critic.module.mean, critic.module.std)
    learner = Learner(PPO, actor, critic, scale, seed=SEED)
    metrics = []
    for step in range(1, STEPS + 1):
        mine = list(enumerate(rollouts(step)))[rank * per_rank :][:per_rank]
        minibatches = []
        for number in range(PPO.minibatches):
            rows = [row for i, row in mine if minibatch_of(i) == number]
            parts = balanced([len(row["ids"]) for row in rows], passes)
            minibatches.append([micro_of([rows[i] for i in part]) for part in parts])
        micros = [m for minibatch in minibatches for m in minibatch]
        with torch.no_grad():
            for m in micros:
                m.logprobs = actor(m.input_ids, m.attention_mask, m.is_response)[0]
                m.ref_logprobs = m.logprobs + m.ref_logprobs
                m.critic_outputs = learner.critic_outputs(m)
        metrics.append(learner.advantages(micros, 0.1) | learner.update(minibatches, step, 0.1))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # so far in this process
    weights = {f"{n}.{k}": w for n, e in (("actor", actor), ("critic", critic)) for k, w in e.named_weights(e.module)}
    return {"metrics": metrics, "graphs": graphs, "weights": {k: w.tolist() for k, w in weights.items()}}


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
