"""Our side of scoring: `RewardModel.score_tokens`, as best-of-n scores its pools."""

from __future__ import annotations

import torch

from benchmarks.peers.channel import Channel, device, versions
from rm.model import RewardModel


def main() -> None:
    channel = Channel()
    job = channel.job
    model = RewardModel.from_pretrained(job["reward_model"], dtype=job["dtype"], attention=job["attention"])
    model.to(device()).eval()
    tokens = [(tuple(group["prompt"]), tuple(r)) for group in job["pool"] for r in group["responses"]]
    rewards: list[float] = []

    def run() -> int:
        rewards[:] = model.score_tokens(tokens).tolist()
        return sum(len(prompt) + len(response) for prompt, response in tokens)

    channel.serve(
        run, lambda: {"rewards": rewards}, versions=versions("torch", "transformers"),
        settings={"dtype": job["dtype"], "attention": job["attention"], "threads": torch.get_num_threads(),
                  "device": device()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
