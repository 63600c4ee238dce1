"""The sync probe on the real model and vLLM: a small update, with its sync skipped and with it done."""

import json
import os
import sys

import torch

from pipelines import config, engine
from pipelines.data import ChatTokenizer, DataError
from pipelines.generate import Generator
from pipelines.models import add_lora, load_causal_lm
from ppo.policy import PolicyModule
from ppo.probe import SyncProbe
from ppo.rollout import make_micros

QUESTIONS = ["Name three fruits.", "Why is the sky blue?", "Write a short greeting.", "What is two plus two?"]


def main(path: str) -> None:
    model, generation = (
        config.Model(path=path, attention="eager"),
        config.Generation(max_new_tokens=24, temperature=0.8, vllm=config.Vllm(max_model_len=256)),
    )
    tokenizer = ChatTokenizer(model)
    engine.init_distributed()
    generator = Generator(model, generation, tokenizer)
    lm = add_lora(load_causal_lm(model, dtype="bfloat16"), config.Lora(rank=8, top_layers=4))
    optim = config.Optim(lr=1e-3, schedule="constant", warmup=0.0)
    actor = engine.Engine(PolicyModule(lm, 0.8), config.Engine(), micro_batch=8, optim=optim, total_steps=9)
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": q}]) for q in QUESTIONS for _ in range(2)]
    completions = [group[0] for group in generator.generate(prompts, seed=1)]
    micros = make_micros(prompts, completions, torch.zeros(8), list(range(8)), tokenizer.pad_id, 8)
    probe, m, found = SyncProbe(actor, generator), micros[0], {}
    probe.before(micros)
    for _ in range(3):
        logps, _ = actor(m.input_ids, m.attention_mask, m.is_response)
        actor.backward(-logps[:4].sum() / m.is_response.sum() + logps[4:].sum() / m.is_response.sum())
        actor.step()
    found["moved"] = float((probe._logprobs() - probe._old)[m.is_response].abs().mean())
    try:
        probe.after(1)
    except DataError as error:
        found["skipped"] = str(error)
    generator.sync(actor.named_weights(actor.module.lm))
    found["synced"] = probe.after(1)
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
