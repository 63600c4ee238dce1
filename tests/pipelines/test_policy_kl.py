"""KL of a policy from its reference, against brute force in float64."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.policy_kl import measure_kl

TEMPERATURE = 0.7


class IdTokenizer:
    """A prompt is its token ids."""

    pad_id = 0

    def prompt_ids(self, prompt):
        return prompt


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def next_token_logps(lm, prompt: list[int], response: list[int]) -> np.ndarray:
    """float64 [T, V] where each response token is predicted, one sequence alone, without padding."""
    logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().numpy() / TEMPERATURE
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [3, 512])
def test_kl_per_response_equals_brute_force(chunk, monkeypatch):
    monkeypatch.setattr("pipelines.policy_kl.LOGIT_ROWS", chunk)
    policy, reference = tiny_llama(0), tiny_llama(1)
    rng = np.random.default_rng(6)
    sizes = [(3, 7), (9, 1), (1, 5), (4, 4), (6, 8)]
    samples = [
        {"prompt": rng.integers(1, 64, p).tolist(), "token_ids": rng.integers(1, 64, r).tolist()} for p, r in sizes
    ]
    found = measure_kl(policy, reference, IdTokenizer(), samples, TEMPERATURE, micro=2)
    for sample, kl in zip(samples, found, strict=True):
        prompt, response = sample["prompt"], sample["token_ids"]
        logp, ref = (next_token_logps(lm, prompt, response) for lm in (policy, reference))
        at = np.arange(len(response)), response
        ratio = ref[at] - logp[at]
        assert kl["kl_rb"] == pytest.approx((np.exp(logp) * (logp - ref)).sum(), rel=1e-4)
        assert kl["logp"] == pytest.approx(logp[at].sum(), rel=1e-4)
        assert kl["kl_k1"] == pytest.approx((logp[at] - ref[at]).sum(), rel=1e-4, abs=1e-4)
        assert kl["kl_k3"] == pytest.approx((np.exp(ratio) - 1 - ratio).sum(), rel=1e-4)
    same = measure_kl(policy, policy, IdTokenizer(), samples, TEMPERATURE, micro=2)
    assert all(abs(kl[k]) < 1e-5 for kl in same for k in ("kl_k1", "kl_k3", "kl_rb"))
