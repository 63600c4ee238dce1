"""Ranks that hold one engine: `tensor_parallel.py MODEL SIZE`, the prompts of all ranks being the same in all."""

import json
import os
import sys

import torch
import torch.distributed as dist

from core.config import Generation, Model, Vllm
from core.data.chat import ChatTokenizer
from core.generation.local import Generator
from core.models.loading import load_causal_lm
from core.training import distributed

QUESTIONS = ["Name three fruits.", "Why is the sky blue?", "Write a short greeting.", "What is two plus two?", "Sing."]
NEW = 8


def mine(rows: list) -> list:
    """Uneven shares: the first rank has the first row alone."""
    if distributed.world_size() == 1:
        return rows
    cut = [0, 1, *range(2, distributed.world_size()), len(rows)]
    return rows[cut[distributed.rank()] : cut[distributed.rank() + 1]]


def main(path: str, size: int) -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    model = Model(path=path)
    tokenizer = ChatTokenizer(model)
    overrides = {"tensor_parallel_size": size}
    cfg = Generation(max_new_tokens=NEW, vllm=Vllm(dtype="float32", max_model_len=128, overrides=overrides))
    generator = Generator(model, cfg, tokenizer)
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
    found: dict = {"heads": generator._llm.apply_model(lambda lm: lm.model.layers[0].self_attn.num_heads)[0]}
    # Ranks that are not the first of their group have another seed, which must not count.
    seed = 5 if distributed.rank() % size == 0 else 1234
    found["sampled"] = [[done(c) for c in group] for group in generator.generate(mine(prompts), n=2, seed=seed)]
    found["greedy"] = [done(c) for c in generator.greedy(mine(prompts), NEW)]
    lm = load_causal_lm(model, dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight.add_(torch.randn_like(weight) * weight.std() * 0.2)
        lm.model.embed_tokens.weight.mul_(1.1)  # tied: the LM head must change with it
    rows = [prompt + list(range(100, 100 + NEW)) for prompt in prompts]
    found["before"] = generator.logprobs_of(mine(rows))
    generator.sync((name, w.detach()) for name, w in lm.named_parameters())
    found["after"] = generator.logprobs_of(mine(rows))
    found["none"] = generator.greedy([] if distributed.rank() else prompts[:1], 1) and 1
    everyones = distributed.gather_rows([found])
    if distributed.rank() == 0:
        print(json.dumps(everyones), flush=True)
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


def done(completion) -> list:
    return [completion.token_ids, completion.logprobs]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
