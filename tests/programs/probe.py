"""What the probe says of a sync of vLLM that was skipped, and of one that was done: two steps."""

import json
import os
import sys

import torch

from core import config
from core.data.chat import ChatTokenizer
from core.errors import DataError
from core.generation.local import Generator
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.training import distributed
from core.training.engine import Engine
from ppo.policy import PolicyModule
from ppo.probe import SyncProbe
from ppo.records import make_micros

QUESTIONS = ["Name three fruits.", "Why is the sky blue?", "Write a short greeting.", "What is two plus two?"]


def main(path: str) -> None:
    model, generation = (
        config.Model(path=path, attention="eager"),
        config.Generation(max_new_tokens=24, temperature=0.8, vllm=config.Vllm(max_model_len=256)),
    )
    tokenizer = ChatTokenizer(model)
    distributed.init_distributed()
    generator = Generator(model, generation, tokenizer)
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
    completions = [group[0] for group in generator.generate(prompts, seed=1)]
    settings = config.Engine()
    lm = add_lora(load_causal_lm(model, dtype=settings.dtype), config.Lora(rank=8, top_layers=4))
    optim = config.Optim(lr=2e-4, schedule="constant", warmup=0.0)
    actor = Engine(PolicyModule(lm, 0.8), settings, micro_batch=4, optim=optim, total_steps=9)
    dtype = getattr(torch, generation.vllm.dtype)
    probe, found = SyncProbe(actor, generator, dtype=dtype), []
    for step in (1, 2):
        probe.sampled(make_micros(prompts, completions, range(4), tokenizer.pad_id, 1), current=True)
        probe.before()
        m = probe._micro
        for _ in range(3):
            logps, _ = actor(m.input_ids, m.attention_mask, m.is_response)
            actor.backward(-logps[m.is_response].mean())
            actor.step()
        row = {"moved": float((probe._actor_logprobs() - probe._old)[m.is_response].abs().mean())}
        weights = list(actor.named_weights(lm, watch=probe.watch))
        try:
            row["skipped"] = str(probe.after(step))
        except DataError as error:
            row["skipped"] = str(error)
        generator.sync(iter(weights))
        found.append(row | {"synced": probe.after(step)})
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
