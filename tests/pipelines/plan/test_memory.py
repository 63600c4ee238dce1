"""Bytes against those of real passes and engines, and what does not fit."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.config import Engine, Lora
from core.models.layers import hidden_states
from core.models.lora import add_lora
from pipelines.plan.engines import frozen_zero
from pipelines.plan.memory import GIB, PROCESS, activation_bytes, held, memory_of, trained_bytes
from pipelines.plan.room import memory_warnings
from tests.builders.plan.sizes import TINY, sizes, tiny_shape
from tests.builders.processes import run_program

ROWS, LENGTH = 2, 24


def kept(layers: int, kernel: str, dtype: torch.dtype, lora: bool) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, parameters left out."""
    lm = LlamaForCausalLM(LlamaConfig(**TINY | {"num_hidden_layers": layers}, attn_implementation=kernel)).to(dtype)
    if lora:
        lm = add_lora(lm, Lora(rank=1))
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = hidden_states(lm, ids, torch.ones_like(ids))
    del states
    return sum(storages.values())


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lora", [False, True])
def test_activations_of_a_layer(kernel, dtype, lora):
    per_layer = (kept(3, kernel, dtype, lora) - kept(1, kernel, dtype, lora)) / (2 * ROWS * LENGTH)
    size = 2 if dtype == torch.bfloat16 else 4
    found = activation_bytes(tiny_shape(), LENGTH, kernel=kernel, size=size, lora=lora)
    assert found == pytest.approx(per_layer, rel=0.03 if lora else 1e-6)  # what adapters keep of their own is left out


CASES = ["3:bfloat16", "2:bfloat16", "0:bfloat16", "3:float32", "0:float32"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines") / "found.json"
    run_program("tests/programs/plan_memory.py", out, *CASES, ranks=2)
    return {f"{row['zero']}:{row['dtype']}": row for row in json.loads(out.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_engines_hold_what_is_counted(engines, case):
    """All tensors of a rank of two, after a step: weights, optimiser states, at stage 3 gradients and their bucket."""
    row = engines[case]
    settings, size = Engine(zero_stage=row["zero"], dtype=row["dtype"]), 2 if row["dtype"] == "bfloat16" else 4
    parts = trained_bytes(row["trained"], settings, 2, gpu=True)
    expected = held(row["params"], size, row["zero"], 2) + parts["optimiser states"] + parts["reduce bucket"]
    if row["zero"] == 3:
        expected += parts["gradients"]
    assert row["bytes"] == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_states_have_the_counted_size(engines, case):
    """What `Engine.save` writes on two ranks, by the formula of `pipelines.plan.training.state_bytes`."""
    row = engines[case]
    half, zero = row["dtype"] == "bfloat16", row["zero"]
    weights = row["params"] - (row["trained"] if zero == 3 else 0)
    expected = (12 if half or zero else 8) * row["trained"] + weights * (2 if half else 4)
    assert row["saved"] == pytest.approx(expected, rel=0.01)


def test_checkpointing_keeps_the_inputs_of_layers():
    plain, less = (
        memory_of(sizes(engine={"processes": 2, "dtype": "bfloat16", "gradient_checkpointing": on}), "rm", None).parts
        for on in (False, True)
    )
    assert less["activations"] < plain["activations"] / 2


def test_a_machine_that_is_too_small_is_warned_of():
    found = sizes()
    memory = memory_of(found, "ppo", None)
    assert not memory_warnings(found, "ppo", memory, 2.01 * memory.total, gpu=False)
    (line,) = memory_warnings(found, "ppo", memory, 1.9 * memory.total, gpu=False)
    assert line.startswith("ppo: 2 rank(s) need")


def test_vllm_and_trainer_that_do_not_fit_together_are_warned_of():
    """Asleep, vLLM leaves its memory to activations; awake, it does not."""
    for sleep in (True, False):
        found = sizes(generation={"vllm": {"gpu_memory_utilization": 0.9, "sleep": sleep}})
        memory = memory_of(found, "ppo", 10 * GIB)
        lines = memory_warnings(found, "ppo", memory, 10 * GIB, gpu=True)
        assert len(lines) == 1 and "do not fit together" in lines[0]
        assert ("or set generation.vllm.sleep" in lines[0]) == (not sleep)
    roomy = sizes(generation={"vllm": {"gpu_memory_utilization": 0.2}})
    assert not memory_warnings(roomy, "ppo", memory_of(roomy, "ppo", 10 * GIB), 10 * GIB, gpu=True)


def test_optimiser_states_leave_room_for_vllm_where_they_are_moved():
    full = {"generation": {"vllm": {"gpu_memory_utilization": 0.9}}}
    kept, moved = (
        memory_of(sizes(ppo={"offload_while_sampling": on}, **full), "ppo", 10 * GIB).moments for on in (False, True)
    )
    assert kept[0] == moved[0] and "optimiser states" in kept[0]  # while it trains
    states = kept[1]["optimiser states"]
    assert states > 0 and moved[1] == {name: size for name, size in kept[1].items() if name != "optimiser states"}


def test_host_memory_that_whole_models_do_not_fit_into_is_warned_of():
    found = sizes(generation={"vllm": {"gpu_memory_utilization": 0.2}})
    memory = memory_of(found, "ppo", 10 * GIB)
    need = 2 * (memory.whole_on_host + PROCESS)
    for host, lines in ((1.01 * need, 0), (0.99 * need, 1)):
        assert len(memory_warnings(found, "ppo", memory, 10 * GIB, gpu=True, host=host)) == lines


def test_sharded_models_are_read_through_the_room_of_a_layer():
    """Actor, critic, reference and proxy; below stage 3, and on one rank, all of each."""
    shape = tiny_shape(vocab_size=2048)
    layer, whole = 2 * shape.embedding_params, 2 * shape.params
    assert shape.embedding_params > shape.layer_params and layer < whole

    def read(stage: str, zero: int, frozen: int, ranks: int = 2) -> float:
        engine = {"processes": ranks, "dtype": "bfloat16", "zero_stage": zero, "frozen_zero_stage": frozen}
        return memory_of(sizes(shape, ranks, engine=engine, ppo={"lora": None}), stage, None).whole_on_host

    assert [read("ppo", zero, frozen) for zero, frozen in ((3, 3), (3, 0), (2, 0))] == [
        4 * layer, 2 * layer + 2 * whole, 4 * whole,
    ]  # fmt: skip
    assert [read("rm", zero, 0) for zero in (3, 2)] == [layer, whole]
    assert (read("ppo", 3, 3, ranks=1), read("rm", 3, 3, ranks=1)) == (4 * whole, whole)


def test_weights_that_leave_vllm_no_cache_are_warned_of():
    shape = tiny_shape(vocab_size=4_000_000)
    found = sizes(shape, generation={"vllm": {"gpu_memory_utilization": 0.1, "dtype": "bfloat16"}})
    available = 2.0 * shape.params * 2
    lines = memory_warnings(found, "ppo", memory_of(found, "ppo", available), available, gpu=True)
    assert any("has no room for one sequence" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "together", "gpu_memory", "stage"),
    [
        (Engine(zero_stage=3), 1e9, None, 0),
        (Engine(zero_stage=3), 1e9, 8e10, 0),
        (Engine(zero_stage=3), 1e10, 8e10, 3),
        (Engine(zero_stage=2), 1e10, 8e10, 0),
        (Engine(zero_stage=3, offload=True), 1e9, 8e10, 3),
        (Engine(zero_stage=0, frozen_zero_stage=3), 1e9, None, 3),
    ],
)
def test_frozen_models_are_sharded_by_the_rule_of_engines(settings, together, gpu_memory, stage):
    assert frozen_zero(settings, together, gpu_memory) == stage


def test_an_lm_head_that_nothing_reads_is_not_counted():
    """Untied, it is there in the policy and under a text regulariser; not in critic, proxy and other reward models."""
    untied, tied = (tiny_shape(vocab_size=2048, tie_word_embeddings=tied) for tied in (False, True))
    head = 2048 * TINY["hidden_size"]
    assert untied.params - untied.trunk_params == head and tied.params == tied.trunk_params == untied.trunk_params
    engine = {"processes": 1, "dtype": "bfloat16", "zero_stage": 0}

    def parts(shape, stage: str, **variant) -> dict[str, float]:
        rm = {"variants": {"it": variant}, "trainable_layers": None, "lora": None}
        of_ppo = {"proxy": "it", "critic_trainable_layers": None}
        return memory_of(sizes(shape, 1, engine=engine, rm=rm, ppo=of_ppo), stage, None).parts

    for part in ("critic", "proxies", "optimiser states"):
        assert parts(untied, "ppo")[part] == parts(tied, "ppo")[part] > 0
    assert parts(untied, "ppo")["actor"] - parts(tied, "ppo")["actor"] == 2 * head
    for part, size in (("weights", 2), ("optimiser states", 12)):
        of = lambda shape, **variant: parts(shape, "rm", **variant)[part]  # noqa: B023, E731
        assert of(untied) == of(tied) and of(untied, text_regulariser="sft") - of(tied) == size * head
