"""vLLM in float32 against transformers in float32: greedy tokens and log-probs, before and after a weight sync."""

import json
import os
import sys

import torch
from torch._dynamo.utils import counters

from core.config import Generation, Model, Vllm
from core.data.chat import ChatTokenizer
from core.generation.local import Generator
from core.models.layers import hidden_states
from core.models.loading import load_causal_lm
from core.models.logits import LmHead
from core.models.logprobs import token_logprobs

QUESTIONS = [
    "Name three fruits.",
    "Why is the sky blue?",
    "Write a short greeting to a friend.",
    "What is two plus two?",
]
NEW = 12


@torch.no_grad()
def compare(lm, prompts, completions) -> dict:
    agree, worst = 0, 0.0
    for prompt, done in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + done.token_ids])
        hidden = hidden_states(lm, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
        agree += int((lm.lm_head(hidden).argmax(-1) == ids[0, len(prompt) :]).sum())
        logps, _ = token_logprobs(LmHead.of(lm), hidden, ids[0, len(prompt) :])
        worst = max(worst, float((logps - torch.tensor(done.logprobs)).abs().max()))
    return {"agree": agree / (len(prompts) * NEW), "worst": worst}


def main(path: str) -> None:
    model = Model(path=path, attention="eager")
    tokenizer = ChatTokenizer(model)
    generator = Generator(model, Generation(vllm=Vllm(dtype="float32", max_model_len=256)), tokenizer)
    lm = load_causal_lm(model, dtype="float32").eval()
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
    found = {"before": compare(lm, prompts, generator.greedy(prompts, NEW))}
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight.add_(torch.randn_like(weight) * weight.std() * 0.2)
        lm.model.embed_tokens.weight.mul_(1.1)  # tied: the LM head must change with it
    found["stale"] = compare(lm, prompts, generator.greedy(prompts, NEW))
    generator.sync((name, w.detach()) for name, w in lm.named_parameters())
    found["after"] = compare(lm, prompts, generator.greedy(prompts, NEW))
    one, two, other = (generator.generate(prompts, n=2, seed=s) for s in (7, 7, 8))
    ids = lambda groups: [c.token_ids for g in groups for c in g]  # noqa: E731
    found["seeded"] = [ids(one) == ids(two), ids(one) == ids(other)]
    # From the most probable token alone, or nearly so at a low temperature, sampling is greedy.
    best = [c.token_ids[:NEW] for c in generator.greedy(prompts, NEW)]
    narrow = [
        generator.generate(prompts, n=2, seed=9, **options) for options in ({"top_p": 1e-6}, {"temperature": 1e-3})
    ]
    found["narrow"] = [
        all(c.token_ids[:NEW] == top[: len(c.token_ids)] for g, top in zip(groups, best, strict=True) for c in g)
        for groups in narrow
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        generator.greedy(prompts[:1], 2)
    ran = {event.key for event in profile.key_averages()}
    found["fused"] = sorted(ran & {f"_C::{name}" for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul")})
    found["preloaded"] = os.environ.get("LD_PRELOAD")
    found["compiled"] = sum(counters["frames"].values())
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
