"""Ordinary updates, a spike, and a gradient of NaN at each ZeRO stage, on the ranks of torchrun."""

import json
import math
import os
import sys
from pathlib import Path

import torch

from core import config
from core.training import distributed
from core.training.engine import Engine
from core.training.optimizer import FEWEST
from tests.builders.tiny_lm import OPTIM, tiny_lm


def update(engine: Engine, ids: torch.Tensor, factor: float = 1.0) -> None:
    engine.backward(engine(input_ids=ids, labels=ids).loss * factor)
    engine.step()


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return dict(engine.named_weights(engine.module))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(other[name].equal(weight) for name, weight in one.items())


def main(out: str) -> None:
    distributed.init_distributed()
    g, found = torch.Generator().manual_seed(3 + distributed.rank()), {}
    batches = [torch.randint(1, 64, (1, 10), generator=g) for _ in range(FEWEST + 3)]
    optim = OPTIM.model_copy(update={"skip_above": 6.0})
    for stage in (0, 1, 2, 3):
        for dtype in ("float32", "bfloat16"):
            cfg = config.Engine(zero_stage=stage, dtype=dtype)
            make = lambda seed: Engine(  # noqa: E731
                tiny_lm(seed).to(getattr(torch, dtype)), cfg, micro_batch=1, optim=optim, total_steps=99  # noqa: B023
            )  # fmt: skip
            engine, facts, start = make(1), {}, None
            start = weights(engine)
            for ids in batches[:FEWEST]:
                update(engine, ids)
            before = weights(engine)
            facts["moved"] = not same(start, before)
            update(engine, batches[FEWEST], 1e4)
            facts["spike_kept"], facts["skipped"] = same(before, weights(engine)), engine.skipped
            update(engine, batches[FEWEST + 1])
            after = weights(engine)
            facts["moved_after"] = not same(before, after)
            engine.save(Path(out) / f"{stage}-{dtype}")
            other = make(2)
            other.load(Path(out) / f"{stage}-{dtype}")
            facts["resumed"] = other.skipped
            update(engine, batches[FEWEST + 2], math.nan)
            facts["nan_kept"], facts["nan_norm"] = same(after, weights(engine)), str(engine.grad_norm)
            found[f"{stage} {dtype}"] = facts
    if distributed.rank() == 0:
        (Path(out) / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
