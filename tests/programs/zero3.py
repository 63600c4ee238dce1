"""Actor and critic under ZeRO-3 on the ranks of torchrun: partitioning, independence, and the numbers of 3 steps."""

import gc
import json
import os
import sys
from pathlib import Path

import torch

from core import config
from core.training import distributed
from core.training.engine import Engine
from tests.builders.tiny_lm import OPTIM, tiny_lm


def whole(trained: Engine) -> dict[str, torch.Tensor]:
    return dict(trained.named_weights(trained.module))


def changed(old, new) -> int:
    return sum(not torch.equal(old[k], new[k]) for k in old)


def main(out: str) -> None:
    cfg = config.Engine(dtype="float32", overrides={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    distributed.init_distributed()
    world, rank = distributed.world_size(), distributed.rank()
    actor, critic = (
        Engine(tiny_lm(seed), cfg, micro_batch=2, accumulation=4 // world, optim=OPTIM, total_steps=3)
        for seed in (1, 2)
    )
    sizes = [(p.ds_tensor.numel(), p.ds_numel) for p in actor.module.parameters()]
    facts = {"world": world, "local": sum(a for a, _ in sizes), "total": sum(b for _, b in sizes), "crossed": 0}
    data = torch.randint(1, 64, (3, 8, 10), generator=torch.Generator().manual_seed(3))
    losses = []
    for step in range(3):
        mine = data[step].chunk(world)[rank].split(2)
        for trained, other in ((actor, critic), (critic, actor)):
            before, bystander = whole(trained), whole(other)
            for micro in mine:
                loss = trained(input_ids=micro, labels=micro).loss
                trained.backward(loss)
                trained.step()
                losses.append(float(loss.detach()))
            facts["crossed"] += changed(bystander, whole(other))
            assert changed(before, whole(trained)) == len(before)
    collected: list[int] = []
    gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
    actor.settle()
    facts["collected"] = collected.count(2)
    facts["grad_norm"] = [actor.grad_norm, critic.grad_norm]
    weights = {f"{n}.{k}": v.tolist() for n, e in (("actor", actor), ("critic", critic)) for k, v in whole(e).items()}
    if rank == 0:
        Path(out).write_text(json.dumps({**facts, "weights": weights}))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
