"""PPO on the ranks of torchrun whose adapter becomes NaN after the first step, and its resumption from that step.

With `overflow`, PPO of a policy whose passes are finite and whose gradients are too large for their norm.
"""

import json
import math
import os
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import AutoTokenizer

from core import config
from core.data.chat import ChatTokenizer
from core.errors import DataError
from core.files import read_rows, write_table
from core.models.loading import load_causal_lm
from core.training import distributed
from ppo.train import Trainer
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel

QUESTIONS = ["Name three fruits.", "Why is the sky blue?", "Write a short greeting.", "What is two plus two?"]


def make_inputs(policy: config.Model, folder: Path) -> None:
    """What the stages before PPO leave: prompts, and a reward model with an untrained head."""
    prompts = [{"prompt_id": str(i), "prompt": [{"role": "user", "content": q}], "num_tokens": 9, "split": "rl_train",
                "order": 0.1 * i} for i, q in enumerate(QUESTIONS)]  # fmt: skip
    (folder / "prompts").mkdir()
    write_table(folder / "prompts" / "prompts.parquet", prompts)
    torch.manual_seed(1)
    model = RewardModel(load_causal_lm(policy, dtype="float32"), "mlp", ChatTokenizer(policy), std=0.1)
    save_reward_model(folder / "rm" / "grm", model, model.lm.named_parameters(), model.head.state_dict())


def overflowing(path: str, folder: Path) -> config.Model:
    """A copy of a policy whose last layer multiplies what it attends to by 1e25, and then by 0."""
    lm, tokenizer = load_causal_lm(config.Model(path=path), dtype="float32"), AutoTokenizer.from_pretrained(path)
    attention = lm.get_decoder().layers[-1].self_attn
    with torch.no_grad():
        attention.v_proj.weight.mul_(1e25)
        attention.o_proj.weight.zero_()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config.Model(path=str(folder), attention="eager")


def poison(trainer: Trainer) -> None:
    """One number of one adapter."""
    weight = next(w for name, w in trainer.actor.module.named_parameters() if "lora_B" in name)
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data.view(-1)[0] = math.nan


def left(out: Path) -> dict:
    """What the run has saved so far."""
    return {
        "state": json.loads((out / "state" / "last.json").read_text())["step"],
        "policies": sorted(p.name for p in (out / "checkpoints").iterdir()),
        "steps": [row["step"] for row in read_rows(out / "metrics.jsonl")],
    }


def main(path: str, folder: str, kind: str = "") -> None:
    policy, where = config.Model(path=path, attention="eager"), Path(folder)
    distributed.init_distributed()
    if kind == "overflow":
        policy = overflowing(path, where / "policy")
    if distributed.rank() == 0:
        make_inputs(policy, where)
    torch.distributed.barrier()
    cfg = config.Config(
        policy=policy, data=config.Data(max_prompt_tokens=64),
        engine=config.Engine(dtype="float32", zero_stage=0 if kind else 3),
        generation=config.Generation(max_new_tokens=8, vllm=config.Vllm(max_model_len=128)),
        ppo=config.Ppo(lora=config.Lora(rank=4, top_layers=2), steps=4, rollouts=8, micro_batch=1, minibatches=2,
                       critic_trainable_layers=1, save_every=1, checkpoint_every=1),
    )  # fmt: skip
    out = where / "ppo"
    trainer = Trainer(cfg, {name: where / name for name in ("prompts", "rm")}, out)
    if kind == "overflow":
        try:
            found = {"said": str(trainer.step(trainer.resume()))}
        except DataError as error:
            found = {"said": str(error)}
        (where / "found.json").write_text(json.dumps(found))
        os._exit(0)
    trainer.step(trainer.resume())
    poison(trainer)
    try:
        found = {"said": str(trainer.step(2))}
    except DataError as error:  # on every rank, or the barrier is not reached
        found = {"said": str(error)}
    torch.distributed.barrier()
    found["stopped"], found["bundles"] = left(out), sorted(str(p) for p in (where / "faults").iterdir())
    trainer.step(trainer.resume())
    torch.distributed.barrier()
    if distributed.rank() == 0:
        (where / "found.json").write_text(json.dumps(found | {"resumed": left(out)}))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
