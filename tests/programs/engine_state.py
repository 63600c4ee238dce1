"""Two training steps at each ZeRO stage, and the second one again from the saved state, on the ranks of torchrun; at
the stages that shard also from a state that was saved and continued while it was in host memory."""

import json
import os
import sys
from pathlib import Path

import torch

from core import config
from core.training import distributed
from core.training.engine import Engine
from tests.builders.tiny_lm import OPTIM, tiny_lm


def step(engine: Engine, ids: torch.Tensor) -> None:
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return dict(engine.named_weights(engine.module))


def main(out: str) -> None:
    distributed.init_distributed()
    data = torch.randint(1, 64, (2, distributed.world_size(), 10), generator=torch.Generator().manual_seed(3))
    mine, found = data[:, distributed.rank(), None], {}
    for stage in (0, 1, 2, 3):
        for dtype in ("float32", "bfloat16"):
            cfg, name = config.Engine(zero_stage=stage, dtype=dtype), f"{stage} {dtype}"
            first, second = (
                Engine(tiny_lm(seed).to(getattr(torch, dtype)), cfg, micro_batch=1, optim=OPTIM, total_steps=2)
                for seed in (1, 2)
            )
            step(first, mine[0])
            first.save(Path(out) / name)
            after_one = weights(first)
            step(first, mine[1])
            second.load(Path(out) / name)
            loaded = weights(second)
            step(second, mine[1])
            one, other = weights(first), weights(second)
            found[name] = [
                all(loaded[k].equal(w) for k, w in after_one.items()),
                all(other[k].equal(w) for k, w in one.items()),
                any(not after_one[k].equal(w) for k, w in one.items()),
            ]
            if stage:
                elsewhere = Engine(tiny_lm(1).to(getattr(torch, dtype)), cfg, micro_batch=1, optim=OPTIM, total_steps=2)
                elsewhere.offload_states()  # before the optimiser has any
                elsewhere.reload_states()
                step(elsewhere, mine[0])
                elsewhere.offload_states()
                elsewhere.save(Path(out) / f"{name} in host memory")
                elsewhere.reload_states()
                step(elsewhere, mine[1])
                second.load(Path(out) / f"{name} in host memory")
                step(second, mine[1])
                one = weights(first)
                found[name] += [all(w.equal(one[k]) for k, w in weights(e).items()) for e in (elsewhere, second)]
    if distributed.rank() == 0:
        (Path(out) / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
