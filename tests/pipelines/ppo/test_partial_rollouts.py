"""New weights in the middle of responses: a real vLLM server goes on under them."""

import threading
import time

import pytest
import torch

from core.config.load import load
from core.data.chat import ChatTokenizer
from core.files import read_rows
from core.generation.remote import ServerGenerator
from core.models.loading import load_causal_lm
from core.ranks import free_port
from ppo.math import logprobs
from tests.builders.inputs.tiny_run import tiny_run
from tests.builders.processes import GRM, answers, background, run_program, wait_for

TOKENS, ROWS = 160, 8
CLOSE = 2e-3
"""Nats, in float32 on both sides."""


@pytest.fixture(scope="module")
def served(tokenizer_path, tmp_path_factory):
    """A configuration whose responses are long, and the address of a server with its policy."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    config, url = tiny_run(tokenizer_path, folder, new_tokens=TOKENS), f"http://127.0.0.1:{port}"
    with background(*GRM, "vllm-serve", "-c", config, "--port", port, log=folder / "server") as server:
        wait_for(lambda: answers(f"{url}/v1/models"), server)
        yield config, url


@torch.no_grad()
def of_model(lm, prompt: list[int], response: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + response])
    return logprobs(lm(ids).logits[:, :-1], ids[:, 1:])[0, len(prompt) - 1 :]


@pytest.mark.long
def test_each_token_has_the_log_prob_of_the_policy_that_sampled_it(served, tmp_path):
    """Up to some token of a response that of the old weights, from there on that of the new ones on the whole text."""
    config, url = served
    cfg = load([config], [])
    sampler = ServerGenerator([url], cfg.policy, cfg.generation, ChatTokenizer(cfg.policy), folder=tmp_path,
                              timeout=120, carry=True)  # fmt: skip
    old, new = (load_causal_lm(cfg.policy, dtype="float32") for _ in range(2))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in new.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    prompts = [[10 + i, 20, 30 + i, 40] for i in range(ROWS)]
    for attempt in range(8):  # the moment may be too early or too late
        sampler.sync(old.named_parameters())
        found = []
        thread = threading.Thread(target=lambda: found.extend(sampler.generate(prompts, seed=0)))  # noqa: B023
        thread.start()
        time.sleep(0.1 + 0.1 * attempt)
        sampler.sync(new.named_parameters())
        thread.join(120)
        switches = []
        for prompt, (done,) in zip(prompts, found, strict=True):
            given = torch.tensor(done.logprobs)
            by_old, by_new = ((given - of_model(lm, prompt, done.token_ids)).abs() for lm in (old, new))
            count = len(given)
            fits = [s for s in range(count + 1) if (by_old[:s] < CLOSE).all() and (by_new[s:] < CLOSE).all()]
            assert fits, (by_old.tolist(), by_new.tolist())
            switches.append(min(fits) > 0 and max(fits) < count)
        if sum(switches) >= ROWS // 2:
            break
    assert sum(switches) >= ROWS // 2, "no sync came in the middle of the responses"
    again = sampler.generate(prompts, seed=0)  # the server is not left paused
    for prompt, (done,) in zip(prompts, again, strict=True):
        assert (torch.tensor(done.logprobs) - of_model(new, prompt, done.token_ids)).abs().max() < CLOSE


@pytest.mark.long
def test_ppo_with_partial_rollouts(served):
    config, url = served
    run_program(
        "-m", "pipelines", "ppo", "-c", config, f"ppo.vllm_servers=[{url}]", "ppo.overlap=2",
        "ppo.partial_rollouts=true", "ppo.steps=8", "ppo.eval_every=4", "ppo.eval_prompts=4",
        "ppo.clip.importance_level=sequence",
    )  # fmt: skip
    rows = read_rows(load([config], []).run_dir / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(0 <= row["staleness_mean"] <= row["staleness_max"] <= 2 for row in rows)
    assert rows[0]["staleness_max"] == 0 and rows[0]["carried_share"] == 0
    assert any(row["carried_share"] > 0 for row in rows), "responses of 160 tokens take longer than an update here"
    assert any(row["staleness_max"] > 0 for row in rows)
