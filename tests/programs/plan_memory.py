"""Bytes that engines of each ZeRO stage hold after two steps, and that they save, for `pipelines.plan.memory`."""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core import config
from core.training import distributed
from core.training.engine import Engine


def model(dtype: str) -> LlamaForCausalLM:
    """Some 2.4 million parameters, of which the upper two layers are trained."""
    sizes = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    lm = LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, dtype)).requires_grad_(False)
    lm.model.layers[2:].requires_grad_(True)
    return lm


def tensor_bytes() -> int:
    """Of all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measured(zero: int, dtype: str) -> dict[str, float]:
    before = tensor_bytes()
    lm = model(dtype)
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    params = sum(p.numel() for p in lm.parameters())
    settings = config.Engine(zero_stage=zero, dtype=dtype)
    engine = Engine(lm, settings, micro_batch=2, optim=config.Optim(lr=1e-3), accumulation=1)
    ids = torch.arange(16).view(2, 8)
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    found = {"zero": zero, "dtype": dtype, "trained": trained, "params": params, "bytes": tensor_bytes() - before}
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder if distributed.rank() == 0 else ""]
        torch.distributed.broadcast_object_list(shared)
        engine.save(Path(shared[0]))
        torch.distributed.barrier()
        found["saved"] = sum(file.stat().st_size for file in Path(shared[0]).rglob("*") if file.is_file())
        torch.distributed.barrier()
    return found


def main(out: str, *cases: str) -> None:
    distributed.init_distributed()
    found = []
    for case in cases:
        zero, dtype = case.split(":")
        found.append(measured(int(zero), dtype))
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
