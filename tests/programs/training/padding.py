"""What an engine calls its trained weights where ZeRO-3 pads the last shards: a count of all ranks, and what is bad."""

import json

import torch
from torch import nn

from core.config.load import load
from core.training import distributed
from core.training.engine import Engine

distributed.init_distributed()
cfg = load([], ["engine.zero_stage=3", "engine.dtype=float32", "engine.gradient_checkpointing=false"])
module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
numel = sum(p.numel() for p in module.parameters())
engine = Engine(module, cfg.engine, micro_batch=2, optim=cfg.rm.optim)
if distributed.rank() == distributed.world_size() - 1:
    for parameter in module.parameters():
        padded = parameter.ds_tensor.numel() * distributed.world_size() - parameter.ds_numel
        if padded:
            parameter.ds_tensor.data[-padded:] = torch.nan
values = list(engine.trained_values())
counts = distributed.global_sum(sum(v.numel() for v in values), sum(int(v.isnan().sum()) for v in values))
if distributed.rank() == 0:
    print(json.dumps({"numel": numel, "counted": counts[0], "nan": counts[1]}))
