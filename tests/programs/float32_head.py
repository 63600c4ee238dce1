"""A float32 LM head under ZeRO-3 in bfloat16, tied and not: log-probs before and after one step of training."""

import json
import os
import sys
from pathlib import Path

import torch

from core import config
from core.models.logits import use_float32_head
from core.training import distributed
from core.training.engine import Engine
from ppo.policy import PolicyModule
from tests.builders.tiny_lm import OPTIM, tiny_lm


def main(out: str) -> None:
    cfg = config.Engine(dtype="bfloat16", overrides={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    distributed.init_distributed()
    ids = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(3))
    inputs = (ids, torch.ones_like(ids), torch.ones(2, 9, dtype=torch.bool))
    facts = {}
    for tied in (False, True):
        lm = tiny_lm(1).bfloat16()
        if tied:
            lm.lm_head.weight = lm.model.embed_tokens.weight
        use_float32_head(lm)
        module = PolicyModule(lm, 1.0)
        with torch.no_grad():
            plain = module(*inputs)[0]
        engine = Engine(module, cfg, micro_batch=2, optim=OPTIM)
        logps = engine(*inputs)[0]
        engine.backward(-logps.mean())
        engine.step()
        after = engine(*inputs)[0]
        facts[f"tied {tied}"] = {
            "dtype": str(logps.dtype),
            "gap": float((logps - plain).detach().abs().max()),
            "gain": float((after - logps).detach().mean()),
        }
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(facts))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
