"""vLLM with an adapter beside the weights, in float32: log-probs against the policy's, three times."""

import json
import os
import sys
from pathlib import Path

import torch

from core import config
from core.data.chat import ChatTokenizer
from core.generation.local import Generator
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.training import distributed
from core.training.weights import save_adapter
from ppo.policy import PolicyModule

QUESTIONS = ["Name three fruits.", "Why is the sky blue?", "Write a short greeting to a friend."]


@torch.no_grad()
def gap(policy: PolicyModule, generator: Generator, rows: list[list[int]]) -> float:
    """Largest difference of the log-probs of these tokens."""
    worst = 0.0
    for row, found in zip(rows, generator.logprobs_of(rows), strict=True):
        ids = torch.tensor([row])
        mask = torch.ones_like(ids)
        logps, _ = policy(ids, mask, mask[:, 1:].bool(), temperature=1.0)
        worst = max(worst, float((logps[0] - torch.tensor(found)).abs().max()))
    return worst


def main(path: str, folder: str) -> None:
    model = config.Model(path=path, attention="eager")
    tokenizer = ChatTokenizer(model)
    distributed.init_distributed()
    sampling = config.Generation(max_new_tokens=8, vllm=config.Vllm(dtype="float32", max_model_len=256))
    lora = config.Lora(rank=4, top_layers=2)
    generator = Generator(model, sampling, tokenizer, adapter=lora)
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
    lm = add_lora(load_causal_lm(model, dtype="float32"), lora)
    policy, found = PolicyModule(lm, 1.0).eval(), {"gaps": [], "stale": [], "on_policy": []}
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, weight in lm.named_parameters():
                if "lora_" in name:
                    weight.copy_(torch.randn_like(weight) * 0.05)
        found["stale"].append(gap(policy, generator, prompts))
        save_adapter(Path(folder), lm)
        generator.load_adapter(Path(folder))
        found["gaps"].append(gap(policy, generator, prompts))
        done = [group[0] for group in generator.generate(prompts, seed=seed)]
        rows = [p + c.token_ids for p, c in zip(prompts, done, strict=True)]
        found["on_policy"].append(gap(policy, generator, rows))
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
