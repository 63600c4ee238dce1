"""Two seeds trained under ZeRO-3, saved whole and as adapters, and scored by PPO's proxy in both forms."""

import json
import os
import sys
from pathlib import Path

import torch

import rm.variants
from core.config import Config
from core.config.load import load
from core.training import distributed
from core.training.engine import Engine, shards
from ppo.proxy import LocalProxy
from rm import train
from rm.ensemble import AdapterEnsemble
from rm.model import RewardModel
from tests.builders.checkpoints import CHATS


def rows() -> list[dict]:
    answers = (
        "A pear.",
        "I do not know.",
        "It is the second one, as was said.",
        "No!",
        "Ask me again.",
        "Yes, gladly.",
    )
    return [
        {
            "prompt_id": str(i), "pair_id": str(i), "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "chosen": answers[i % 6], "rejected": answers[(i + 1 + i // 6) % 6], "flipped": False,
            "response": answers[i % 6], "weight": 1.0,
        }
        for i in range(16)
    ]  # fmt: skip


def config(base: str, save: str) -> Config:
    settings = [
        f"rm.base.path={base}", f"rm.save={save}", "rm.lora={rank: 4, alpha: 32, top_layers: 2}", "rm.global_batch=8",
        "rm.micro_batch=2", "rm.optim.lr=0.02", "engine.dtype=float32", "rm.num_layers=3",
        "rm.variants={a: {text_regulariser: sft}, b: {seed: 1}, grm: {}}",
        "engine.frozen_zero_stage=3", "engine.overrides={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ]  # fmt: skip
    return load([], settings)


def main(base: str, out: str) -> None:
    distributed.init_distributed()
    folder = Path(out)
    cfg = config(base, "merged")
    for name in ("a", "b"):
        variant = cfg.rm.variants[name]
        engine, model, _ = train.fit(
            cfg.rm, cfg.engine_of("rm"), variant, rows(), folder / "log" / name, name=name, seed=cfg.run.seed
        )
        train.measure(engine, model, rows(), rows(), folder / "log" / name)
        for save in ("merged", "adapter"):
            train.save(config(base, save).rm, engine, model, variant, folder / save / name, seed=cfg.run.seed)
    torch.distributed.barrier()
    divide = shards(cfg.engine, 3)
    divided = {
        "divided": [RewardModel.from_pretrained(folder / "merged" / n, dtype="float32", shards=divide) for n in "ab"],
        "divided adapters": [
            RewardModel.from_pretrained(folder / "adapter" / n, dtype="float32", shards=divide) for n in "ab"
        ],
    }
    of_divided = {name: [Engine(m, cfg.engine, micro_batch=2) for m in models] for name, models in divided.items()}
    together = AdapterEnsemble.from_pretrained([folder / "adapter" / n for n in "ab"], dtype="float32", shards=divide)
    of_divided["divided and shared"] = together.through(Engine(together, cfg.engine, micro_batch=2))
    whole = [RewardModel.from_pretrained(folder / "merged" / n, dtype="float32") for n in ("a", "b")]
    whole = [Engine(model, cfg.engine, micro_batch=2) for model in whole]
    ensemble = AdapterEnsemble.from_pretrained([folder / "adapter" / n for n in ("a", "b")], dtype="float32")
    shared = ensemble.through(Engine(ensemble, cfg.engine, micro_batch=2))
    mine = [{"prompt": chat[:-1], "response": chat[-1]["content"]} for chat in CHATS[distributed.rank() :][:2]]
    found = {
        name: distributed.gather_rows(LocalProxy(members, "uwo:0.5").score(mine).tolist())
        for name, members in (("whole", whole), ("shared", shared), ("again", shared), *of_divided.items())
    }
    rm.variants.shards = lambda *_: None
    engine, model, _ = train.fit(
        cfg.rm, cfg.engine_of("rm"), cfg.rm.variants["a"], rows(), folder / "log" / "whole", name="a", seed=cfg.run.seed
    )
    train.save(cfg.rm, engine, model, cfg.rm.variants["a"], folder / "merged" / "whole", seed=cfg.run.seed)
    if distributed.rank() == 0:
        (folder / "scores.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
