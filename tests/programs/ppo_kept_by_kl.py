"""PPO on the ranks of torchrun that keeps policies by their KL, stopped after three of its steps and resumed from the
second. `weights.safetensors` holds an adapter's weight after every step, as the trainer had it."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from core import config
from core.training import distributed
from core.training.weights import gathered
from ppo.train import Trainer
from tests.programs.ppo_not_finite import make_inputs

STEPS, EVERY = 8, 4


def weight(trainer: Trainer) -> Tensor:
    (found, *_) = (w for name, w in trainer.actor.module.named_parameters() if "lora_B" in name)
    with gathered([found]):
        return found.detach().float().cpu().clone()


def main(path: str, folder: str, nats: str) -> None:
    policy, where = config.Model(path=path, attention="eager"), Path(folder)
    distributed.init_distributed()
    if distributed.rank() == 0:
        make_inputs(policy, where)
    torch.distributed.barrier()
    cfg = config.Config(
        policy=policy, data=config.Data(max_prompt_tokens=64), engine=config.Engine(dtype="float32"),
        generation=config.Generation(max_new_tokens=8, vllm=config.Vllm(max_model_len=128, dtype="float32")),
        ppo=config.Ppo(lora=config.Lora(rank=4, top_layers=2), steps=STEPS, rollouts=8, micro_batch=1, minibatches=2,
                       critic_trainable_layers=1, save_every=2, checkpoint_every=EVERY, checkpoint_kl=float(nats),
                       kl=config.Kl(coef=0.0), actor=config.Optim(lr=0.004, schedule="constant", warmup=0.0)),
    )  # fmt: skip
    out = where / "ppo"
    trainer = Trainer(cfg, {name: where / name for name in ("prompts", "rm")}, out)
    weights, first = {}, trainer.resume()
    for step in range(first, 4):
        trainer.step(step)
    if distributed.rank() == 0:  # of a policy that only the steps that were lost came to
        (out / "checkpoints" / "step-0007").mkdir(parents=True)
        (out / "checkpoints" / "step-0007" / "lost").touch()
    torch.distributed.barrier()
    trainer.spacing.load_state_dict({"last": 1e9})
    again = trainer.resume()
    for step in range(1, STEPS + 1):
        if step >= again:
            trainer.step(step)
            weights[str(step)] = weight(trainer)
    if distributed.rank() == 0:
        save_file(weights, where / "weights.safetensors")
        (where / "found.json").write_text(json.dumps({"first": first, "again": again}))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
