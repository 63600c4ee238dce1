"""transformers' side of scoring: a sequence classifier on padded batches, sorted by length."""

from __future__ import annotations

import torch
from channel import Channel, device, versions
from transformers import AutoModelForSequenceClassification


def main() -> None:
    channel = Channel()
    job = channel.job
    model = AutoModelForSequenceClassification.from_pretrained(
        job["classifier"], dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
    ).to(device())
    model.eval()
    texts = [group["prompt"] + response for group in job["pool"] for response in group["responses"]]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rewards = [0.0] * len(texts)

    @torch.no_grad()
    def run() -> int:
        for start in range(0, len(order), job["batch"]):
            chosen = order[start : start + job["batch"]]
            ids, mask = right_padded([texts[i] for i in chosen], model.config.pad_token_id)
            logits = model(input_ids=ids.to(device()), attention_mask=mask.to(device()), use_cache=False).logits
            for i, reward in zip(chosen, logits.float().squeeze(-1).tolist(), strict=True):
                rewards[i] = reward
        return sum(map(len, texts))

    channel.serve(
        run, lambda: {"rewards": rewards}, versions=versions("transformers", "torch"),
        settings={"dtype": job["dtype"], "attention": job["attention"], "threads": torch.get_num_threads(),
                  "batch": job["batch"], "sorted by length": True, "device": device()},
    )  # fmt: skip


def right_padded(texts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, texts))
    ids, mask = torch.full((len(texts), longest), pad_id), torch.zeros(len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids, mask


if __name__ == "__main__":
    main()
