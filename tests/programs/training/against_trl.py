"""Bradley-Terry training here and by `trl.RewardTrainer`: equal starts, the same pairs in the same order."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer

from core.config.load import load
from rm import train
from rm.pairs import batch_plan, tokenise
from rm.variants import build
from tests.builders.planted_pairs import pair_rows, settings

STEPS, BATCH = 8, 16
CASES = {
    "plain": ({}, {}),
    "centred": ({"center": 0.1}, {"center_rewards_coefficient": 0.1}),
    "margin": ({"margin": 0.5}, {}),
}
"""Name -> options of the variant, options of RewardConfig. Every row's gap in ratings is 1.0."""


class Losses(TrainerCallback):
    def __init__(self):
        self.found: list[float] = []

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.found.append(logs["loss"])


def by_trl(base: str, pairs, head, tokenizer, optim, margin: float, **more) -> tuple[list[float], dict]:
    """Losses of its steps, and the weights after them."""
    data = {f"{side}_ids": [p.prompt + getattr(p, side) for p in pairs] for side in ("chosen", "rejected")}
    if margin:
        data["margin"] = [margin] * len(pairs)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    model.score.weight.data.copy_(head)
    hf, losses = tokenizer.hf, Losses()
    hf.pad_token_id = tokenizer.pad_id
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model,
            RewardConfig(
                output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, max_length=None,
                learning_rate=optim.lr, lr_scheduler_type=optim.schedule, warmup_steps=0, weight_decay=0.0,
                adam_beta1=optim.betas[0], adam_beta2=optim.betas[1], adam_epsilon=optim.eps,
                max_grad_norm=optim.max_grad_norm, bf16=False, gradient_checkpointing=False, disable_dropout=True,
                train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none",
                disable_tqdm=True, use_cpu=True, **more,
            ),
            train_dataset=Dataset.from_dict(data), processing_class=hf, callbacks=[losses],
        )  # fmt: skip
        trainer.train()
    return losses.found, {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def main(base: str, out: str) -> None:
    theirs, ours = {}, {}
    given = {
        name: load([], [
            *settings(base, head="linear", common_epochs=1, **options), "engine.zero_stage=2", "rm.optim.warmup=0",
            "rm.optim.eps=1e-5", "rm.optim.schedule=cosine", f"rm.global_batch={BATCH}", f"rm.micro_batch={BATCH}",
        ])
        for name, (options, _) in CASES.items()
    }  # fmt: skip
    rows = pair_rows(STEPS * BATCH, seed=1, noise=0.1)
    for name, cfg in given.items():  # before a process group is made, which accelerate would join
        variant = cfg.rm.variants["it"]
        model, tokenizer = build(cfg.rm, cfg.engine, variant, cfg.run.seed)
        pairs, _ = tokenise(train.arm_rows(rows, variant, cfg.run.seed), tokenizer, cfg.rm, variant)
        ordered = [pairs[i] for batch in batch_plan(pairs, cfg.rm, variant, cfg.run.seed) for i in batch]
        head = model.head.weight.detach().clone()
        theirs[name] = by_trl(base, ordered, head, tokenizer, cfg.rm.optim, variant.margin, **CASES[name][1])
    for name, cfg in given.items():
        variant = cfg.rm.variants["it"]
        folder = Path(out) / name
        engine, model, _ = train.fit(cfg.rm, cfg.engine, variant, rows, folder, name=name, seed=cfg.run.seed)
        weights = {k: v.detach().clone() for k, v in engine.named_weights(model.lm) if k.startswith("model.")}
        losses = [json.loads(line)["loss"] for line in (folder / "train.jsonl").read_text().splitlines()]
        ours[name] = losses, weights | {"score.weight": model.head.weight.detach().clone()}
    start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).state_dict()
    found = {}
    for name in CASES:
        (mine, my_weights), (other, their_weights) = ours[name], theirs[name]
        assert my_weights.keys() == their_weights.keys(), sorted(my_weights.keys() ^ their_weights.keys())
        moved = {k: float((w - start[k]).abs().max()) for k, w in their_weights.items() if k != "score.weight"}
        apart = {k: float((w - my_weights[k]).abs().max()) for k, w in their_weights.items()}
        found[name] = {"ours": mine, "theirs": other, "moved": max(moved.values()), "apart": max(apart.values())}
    (Path(out) / "found.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
