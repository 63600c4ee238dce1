"""TRL's side of training a reward model: `trl.RewardTrainer` on the batches of the job, in their order."""

from __future__ import annotations

import tempfile

import torch
from channel import Channel, device, now, versions
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer


class Turns(TrainerCallback):
    """Holds training back until a run is requested, and reports its seconds at its last step."""

    def __init__(self, channel: Channel, steps: int, pairs: int):
        self.channel, self.steps, self.pairs = channel, steps, pairs
        self.started = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            self.channel.wait_for_run(lambda: {"losses": self.losses})
            self.started = now()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            self.channel.answer(seconds=now() - self.started, work=self.pairs)

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    channel = Channel()
    job = channel.job
    pairs = [pair for batch in job["batches"] for pair in batch]
    data = Dataset.from_dict({f"{side}_ids": [p["prompt"] + p[side] for p in pairs] for side in ("chosen", "rejected")})
    model = AutoModelForSequenceClassification.from_pretrained(
        job["model"], num_labels=1, dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
    )
    model.score.weight.data.copy_(torch.tensor([job["head"]]))
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token_id = job["pad_id"]
    lora = job["lora"] and LoraConfig(
        task_type="SEQ_CLS", r=job["lora"]["rank"], lora_alpha=job["lora"]["alpha"],
        target_modules=job["lora"]["targets"], modules_to_save=["score"], lora_dropout=0.0,
    )  # fmt: skip
    turns = Turns(channel, job["steps_per_run"], job["steps_per_run"] * job["batch"])
    with tempfile.TemporaryDirectory() as folder:
        settings = RewardConfig(
            output_dir=folder, per_device_train_batch_size=job["batch"], num_train_epochs=1, max_length=None,
            learning_rate=job["lr"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
            # The weights are in this type already; autocast beside it would only cost time.
            bf16=False, gradient_checkpointing=False, train_sampling_strategy="sequential", logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device() == "cpu",
        )  # fmt: skip
        trainer = RewardTrainer(
            model, settings, train_dataset=data, processing_class=tokenizer, peft_config=lora or None,
            callbacks=[turns],
        )  # fmt: skip
        channel.answer(about={
            "versions": versions("trl", "torch", "transformers", "peft", "accelerate"),
            "settings": {"dtype": job["dtype"], "attention": job["attention"], "threads": torch.get_num_threads(),
                         "optimiser": str(settings.optim), "float32 master weights": False},
        })  # fmt: skip
        trainer.train()
        channel.wait_for_run(lambda: {"losses": turns.losses})  # until the runner has compared


if __name__ == "__main__":
    main()
