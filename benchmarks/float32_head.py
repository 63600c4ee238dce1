"""What `engine.float32_head` gains and costs: `python -m benchmarks.float32_head [MODEL] [TOKENS]`.

Prints how far log-probs from bfloat16 logits are from those of a float64 head on the same bfloat16 hidden states, with
and without the option, and the seconds of the head alone, forward and backward, with frozen and with trained weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from core.config import Model
from core.data.chat import ChatTokenizer
from core.models import CausalLM
from core.models.layers import hidden_states
from core.models.loading import load_causal_lm
from core.models.logits import LmHead, after_head, use_float32_head
from core.models.logprobs import token_logprobs

QUESTIONS = ("Why do cats purr?", "How do I boil an egg?", "What is a hash table?", "Who was Ada Lovelace?")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.float32_head", description=__doc__)
    parser.add_argument("model", nargs="?", default="models/SmolLM2-135M-Instruct", help="folder or hub id")
    parser.add_argument("tokens", nargs="?", type=int, default=512, help="sampled tokens to compare (%(default)s)")
    options = parser.parse_args()
    path, count = options.model, options.tokens
    where = Model(path=path)
    lm = load_causal_lm(where, dtype="bfloat16")
    hidden, tokens = responses(lm, ChatTokenizer(where), count)
    head = LmHead.of(lm)
    exact = after_head(hidden.double() @ head.linear.weight.double().T, head.scale, head.cap)
    expected = exact.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    print(f"{path}, {len(tokens)} sampled tokens, vocabulary {head.linear.out_features}")
    for name in ("bfloat16 head", "float32 head"):
        if name.startswith("float32"):
            use_float32_head(lm)
        with torch.no_grad():
            error = (token_logprobs(LmHead.of(lm), hidden, tokens)[0] - expected).abs()
        frozen, trained = (seconds(partial(passes, lm, hidden, tokens, t)) for t in (False, True))
        print(
            f"{name}: log-probs off by {error.mean():.5f} on average, {error.max():.5f} at most; forward and backward "
            f"{frozen:.2f} s with frozen weights, {trained:.2f} s with trained ones"
        )


@torch.no_grad()
def responses(lm: CausalLM, tokenizer: ChatTokenizer, count: int) -> tuple[Tensor, Tensor]:
    """Hidden states [count, H] before sampled response tokens, and these tokens [count]."""
    torch.manual_seed(0)
    states, tokens = [], []
    for question in QUESTIONS:
        prompt = torch.tensor([tokenizer.prompt_ids([{"role": "user", "content": question}])])
        ids = lm.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, eos_token_id=None,
                          max_new_tokens=count // len(QUESTIONS))  # fmt: skip
        states.append(hidden_states(lm, ids, torch.ones_like(ids))[0, prompt.shape[1] - 1 : -1])
        tokens.append(ids[0, prompt.shape[1] :])
    return torch.cat(states), torch.cat(tokens)


def passes(lm: CausalLM, hidden: Tensor, tokens: Tensor, trained: bool) -> None:
    lm.requires_grad_(False)
    lm.get_output_embeddings().weight.requires_grad_(trained)
    token_logprobs(LmHead.of(lm), hidden.detach().requires_grad_(), tokens)[0].sum().backward()
    lm.zero_grad()


def seconds(call: Callable[[], None]) -> float:
    """The fastest of three calls."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
