"""Every kind of reward model, trained under ZeRO-3 on the ranks of torchrun, saved, read again and measured."""

import json
import os
import sys
from pathlib import Path

import torch

from core.config import RewardVariant
from core.config.load import load
from core.training import distributed
from rm import train
from rm.model import RewardModel
from tests.builders.planted_pairs import METHODS, accuracy, pair_rows, settings


def main(base: str, out: str) -> None:
    distributed.init_distributed()
    folder, found = Path(out), {}
    for name, options in METHODS.items():
        cfg = load([], settings(base, **options))
        variant: RewardVariant = cfg.rm.variants["it"]
        rows, held_out = pair_rows(160, seed=1, noise=variant.noise_rate), pair_rows(64, seed=2)
        engine, model, counts = train.fit(
            cfg.rm, cfg.engine, variant, rows, folder / name, name=name, seed=cfg.run.seed
        )
        measured = train.measure(engine, model, held_out, held_out[:8], folder / name)
        train.save(cfg.rm, engine, model, variant, folder / name, seed=cfg.run.seed)
        del engine, model
        torch.distributed.barrier()
        if distributed.rank() == 0:
            again = RewardModel.from_pretrained(folder / name, dtype="float32", attention="eager")
            found[name] = {
                "steps": counts["steps"],
                "folder": str(folder / name),
                "accuracy": measured["accuracy_gold"]["mean"],
                "read_again": accuracy(again, held_out),
                "files": sorted(file.name for file in (folder / name).iterdir()),
                "log": [json.loads(line) for line in (folder / name / "train.jsonl").read_text().splitlines()],
            }
    if distributed.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
