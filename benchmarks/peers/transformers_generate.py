"""transformers' side of sampling: `generate` on all prompts at once, left-padded, with the model's own cache."""

from __future__ import annotations

import torch
from channel import Channel, device, versions
from transformers import AutoModelForCausalLM


def main() -> None:
    channel = Channel()
    job = channel.job
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
    ).to(device())
    model.eval()
    inputs = left_padded(job["prompts"], job["pad_id"])
    torch.manual_seed(1)

    @torch.no_grad()
    def generate(inputs: dict[str, torch.Tensor], **options) -> list[list[int]]:
        where = {name: tensor.to(device()) for name, tensor in inputs.items()}
        ids = model.generate(**where, pad_token_id=job["pad_id"], **options)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    def run() -> int:
        responses = generate(
            inputs, do_sample=True, temperature=job["generation"]["temperature"], top_k=0, top_p=1.0,
            num_return_sequences=job["n"], max_new_tokens=job["max_new_tokens"], eos_token_id=job["stop_ids"],
        )  # fmt: skip
        return sum(map(length, responses))

    def length(response: list[int]) -> int:
        """Tokens up to the end of turn, as both sides count them."""
        ends = [at for at, token in enumerate(response) if token in job["stop_ids"]]
        return ends[0] + 1 if ends else len(response)

    def check() -> dict:
        few = left_padded(job["prompts"][: job["compared"]], job["pad_id"])
        return {"greedy": generate(few, do_sample=False, max_new_tokens=job["greedy"], eos_token_id=None)}

    channel.serve(
        run, check, versions=versions("transformers", "torch"),
        settings={"dtype": job["dtype"], "attention": job["attention"], "threads": torch.get_num_threads(),
                  "device": device()},
    )  # fmt: skip


def left_padded(prompts: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    columns = torch.arange(longest)
    starts = torch.tensor([longest - len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (columns >= starts[:, None]).long()}


if __name__ == "__main__":
    main()
