"""Our side of training a reward model: optimiser steps of `rm.train` on the batches of the job."""

from __future__ import annotations

from typing import cast

import torch

from benchmarks.peers.channel import Channel, versions
from core.config import Engine as EngineSettings
from core.config import Lora, Model, Optim, RewardTraining, RewardVariant
from core.training.distributed import init_distributed
from core.training.engine import Engine
from rm.pairs import Pair
from rm.train import train_step
from rm.variants import build


def main() -> None:
    channel = Channel()
    job = channel.job
    init_distributed()
    batches = [[Pair(**pair) for pair in batch] for batch in job["batches"]]
    optim = Optim(lr=job["lr"], schedule="constant", warmup=0.0, betas=(0.9, 0.999))
    rm = RewardTraining(
        base=Model(path=job["model"], attention=job["attention"]), global_batch=job["batch"], micro_batch=job["batch"],
        lora=Lora(**job["lora"]) if job["lora"] else None, optim=optim,
    )  # fmt: skip
    variant = RewardVariant(**job["variant"])
    settings = EngineSettings(processes=1, zero_stage=0, dtype=job["dtype"])
    model, _ = build(rm, settings, variant, seed=1)
    if job["head"]:
        cast(torch.Tensor, model.head.weight).data.copy_(torch.tensor([job["head"]]))
    engine = Engine(model, settings, micro_batch=rm.micro_batch, optim=optim, total_steps=len(batches))
    losses, coming = [], iter(batches)

    def run() -> int:
        pairs = 0
        for _ in range(job["steps_per_run"]):
            batch = next(coming)
            losses.append(train_step(engine, model, variant, batch, None)["loss"])
            pairs += len(batch)
        return pairs

    channel.serve(
        run, lambda: {"losses": losses}, versions=versions("torch", "deepspeed", "transformers", "peft"),
        settings={"dtype": job["dtype"], "attention": job["attention"], "threads": torch.get_num_threads(),
                  "zero_stage": 0, "float32 master weights": job["dtype"] == "bfloat16"},
    )  # fmt: skip


if __name__ == "__main__":
    main()
