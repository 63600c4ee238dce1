"""TRL's side of PPO: iterations of the `PPOTrainer` of TRL 0.24.

It needs an environment of its own (`make bench PEERS=1`): later releases moved that trainer to `trl.experimental` and
then removed it, so TRL 1.16 has no PPO.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from channel import Channel, device, now, versions
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import PPOConfig, PPOTrainer  # type: ignore[attr-defined]  # of TRL 0.24


class Turns(TrainerCallback):
    """Holds training back until a run is requested; a run is one iteration."""

    def __init__(self, channel: Channel, rollouts: int):
        self.channel, self.rollouts = channel, rollouts
        self.trained: dict[str, int] = {}
        self.rewards: list[float] = []
        self.started = 0.0

    def on_train_begin(self, args, state, control, **_):
        self._wait()

    def on_step_end(self, args, state, control, **_):
        self.channel.answer(seconds=now() - self.started, work=self.rollouts)
        self._wait()

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "objective/scores" in logs:
            self.rewards.append(logs["objective/scores"])

    def _wait(self) -> None:
        self.channel.wait_for_run(lambda: {"trained": self.trained, "reward": self.rewards[0]})
        self.started = now()


def main() -> None:
    channel = Channel()
    job = channel.job
    options = {"dtype": getattr(torch, job["dtype"]), "attn_implementation": job["attention"], **job["settings"]}
    # Of the file alone: transformers 4 does not know the class that transformers 5 writes beside it.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{job['policy']}/tokenizer.json", padding_side="left")
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([job["pad_id"], job["eot_id"]])
    policy = adapted(AutoModelForCausalLM.from_pretrained(job["policy"], **options), job["lora"])
    reward_model = AutoModelForSequenceClassification.from_pretrained(job["classifier"], num_labels=1, **options)
    critic = AutoModelForSequenceClassification.from_pretrained(job["classifier"], num_labels=1, **options)
    start_critic(critic, job["critic_trainable_layers"])
    data = Dataset.from_dict({"input_ids": job["prompts"]})
    turns = Turns(channel, job["rollouts"])
    turns.trained = {name: trained(model) for name, model in (("actor", policy), ("critic", critic))}
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder,
            # The whole rollout as a "device batch" and no accumulation: so each minibatch is one pass and one optimiser
            # step. With accumulation this trainer steps once for several minibatches.
            per_device_train_batch_size=job["rollouts"], gradient_accumulation_steps=1,
            num_mini_batches=job["minibatches"], num_ppo_epochs=job["epochs"], total_episodes=job["rollouts"] * 10_000,
            local_rollout_forward_batch_size=job["forward_batch"], response_length=job["max_new_tokens"],
            temperature=job["temperature"], stop_token_id=job["eot_id"], kl_coef=job["kl_coef"],
            gamma=job["gamma"], lam=job["lam"], learning_rate=job["lr"], lr_scheduler_type="constant",
            # The weights are in this type already.
            bf16=False, gradient_checkpointing=False, num_sample_generations=0, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=device() == "cpu", seed=1,
        )  # fmt: skip
        trainer = PPOTrainer(
            settings, tokenizer, policy, None, reward_model, data, critic, eval_dataset=data, callbacks=[turns]
        )
        channel.answer(about={
            "versions": versions("trl", "torch", "transformers", "peft", "accelerate"),
            "settings": {"dtype": job["dtype"], "attention": job["attention"], "threads": torch.get_num_threads(),
                         "forward_batch": job["forward_batch"], "device": device()},
        })  # fmt: skip
        trainer.train()


def adapted(lm: Any, lora: dict) -> Any:
    """The policy with adapters on its top layers, in the type of its weights: float32 adapters would be slower."""
    depth = lm.config.num_hidden_layers
    top = lora["top_layers"] or depth
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=0.0, target_modules=lora["targets"],
        layers_to_transform=list(range(depth - top, depth)), task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(lm, config, autocast_adapter_dtype=False)


def start_critic(critic: Any, trainable_layers: int | None) -> None:
    """A head of zeros, and only the top layers and the head trained: as ours."""
    torch.nn.init.zeros_(critic.score.weight)
    if trainable_layers is None:
        return
    critic.requires_grad_(False)
    for part in (*critic.model.layers[-trainable_layers:], critic.model.norm, critic.score):
        part.requires_grad_(True)


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    main()
