"""vLLM against transformers, on the first layers of the real model."""

import json
import os

import pytest
import torch

from tests.builders.policies import tiny_policy
from tests.builders.processes import run_program


@pytest.mark.slow
def test_vllm_equals_transformers_before_and_after_sync(small_policy):
    # Without libraries for CPUs, so that vLLM looks for its own.
    printed = run_program("tests/programs/vllm_parity.py", small_policy, LD_PRELOAD="")
    found = json.loads(printed.splitlines()[-1])
    assert found["preloaded"] == "", "programs that are started later would get libraries of vLLM's"
    # float32 on both sides: only the order of sums differs
    for when in ("before", "after"):
        assert found[when]["agree"] == 1.0, found
        assert found[when]["worst"] < 2e-3, found
    # the comparison would notice old weights
    assert found["stale"]["worst"] > 0.1, found
    assert found["seeded"] == [True, False]
    assert found["narrow"] == [True, True]
    if not torch.cuda.is_available():  # a compiler takes longer than it gains, and not every machine has one
        assert found["compiled"] == 0
        assert found["fused"] == ["_C::fused_add_rms_norm", "_C::rms_norm", "_C::silu_and_mul"]


@pytest.mark.slow
def test_adapters_beside_the_weights_replace_each_other(small_policy, tmp_path):
    found = json.loads(run_program("tests/programs/adapter_sync.py", small_policy, tmp_path).splitlines()[-1])
    assert max(found["gaps"] + found["on_policy"]) < 2e-3, found
    assert min(found["stale"]) > 0.1, found


@pytest.mark.slow
def test_a_model_of_the_same_class_loads_beside_vllm(monkeypatch):
    """For families without an implementation of its own, vLLM changes the class of transformers."""
    for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE"):  # vLLM sets them in this process, whose children would see them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    from transformers import GPTNeoXConfig, GPTNeoXModel
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import VllmConfig, set_current_vllm_config

    from core.generation.local import separate_classes

    config = GPTNeoXConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=2)  # fmt: skip
    support_torch_compile(dynamic_arg_dims={"input_ids": 1})(GPTNeoXModel)
    with set_current_vllm_config(VllmConfig()):
        of_vllm = torch.nn.Sequential(GPTNeoXModel(config))
    with pytest.raises(AssertionError, match="vLLM config is not set"):
        GPTNeoXModel(config)
    separate_classes(of_vllm)
    beside = GPTNeoXModel(config)
    assert beside(torch.arange(4)[None]).last_hidden_state.shape == (1, 4, 64)
    assert type(of_vllm[0]) is not type(beside) and isinstance(of_vllm[0], GPTNeoXModel)
    assert of_vllm[0].do_not_compile is not None and "__call__" in vars(type(of_vllm[0]))


@pytest.mark.slow
def test_overrides_reach_vllm_and_its_server(small_policy):
    found = json.loads(run_program("tests/programs/sampling/vllm_overrides.py", small_policy).splitlines()[-1])
    assert found["here"] == {
        "max_num_batched_tokens": 192,
        "enable_prefix_caching": False,
        "block_size": 128,  # vLLM's own, since null takes ours away
        "tensor_parallel_size": 1,  # this process is alone
        "log_stats": True,
        "autotune": False,
        "priority": ["grm_cpu", "native"],  # what the project sets beside it stays
        "responses": 2,
    }
    assert found["server"] == {}
    assert "vLLM refuses generation.vllm.overrides" in found["refused"] and "fp9" in found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma"])  # the LM head of gemma is tied
def test_two_ranks_hold_one_engine(tokenizer_path, tmp_path, family):
    """Both give it the prompts of both, and each gets the responses to its own: those of an engine in one process."""
    policy = tiny_policy(family, tokenizer_path, tmp_path / "policy")
    run = lambda ranks: run_program("tests/programs/sampling/tensor_parallel.py", policy, ranks or 1, ranks=ranks)  # noqa: E731
    ((alone,), ranks) = (json.loads(run(number).splitlines()[-1]) for number in (None, 2))
    assert [rank["heads"] for rank in ranks] == [2, 2] and alone["heads"] == 4
    assert [len(rank["greedy"]) for rank in ranks] == [1, 4] and [rank["none"] for rank in ranks] == [1, []]
    both = {name: [row for rank in ranks for row in rank[name]] for name in ("sampled", "greedy", "before", "after")}
    tokens = lambda responses: [ids for ids, _ in responses]  # noqa: E731
    assert tokens(both["greedy"]) == tokens(alone["greedy"])
    assert [tokens(group) for group in both["sampled"]] == [tokens(group) for group in alone["sampled"]]
    assert both["sampled"][0] != both["sampled"][1]
    logprobs = lambda responses: [found for _, found in responses]  # noqa: E731
    assert furthest(logprobs(both["greedy"]), logprobs(alone["greedy"])) < 1e-3
    assert furthest(both["before"], alone["before"]) < 1e-3
    assert furthest(both["after"], alone["after"]) < 1e-3
    assert furthest(both["after"], both["before"]) > 0.1  # old weights would be noticed


def furthest(rows: list[list[float]], others: list[list[float]]) -> float:
    pairs = [pair for row, other in zip(rows, others, strict=True) for pair in zip(row, other, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_stage_that_scores_has_no_vllm_in_memory(small_policy, tmp_path):
    """Its weights and cache stood beside the reward models: on a GPU `gpu_memory_utilization` of the memory."""
    out = run_program("tests/programs/sampling/closed.py", small_policy, tmp_path)
    assert json.loads(out.splitlines()[-1]) == {"samples": 8, "left": [False] * 3}
