"""DeepSpeed ZeRO-3 for real, on one and two ranks of this machine."""

import json
from types import SimpleNamespace

import pytest
import torch

from core.config import Engine, Optim
from core.training.engine import deepspeed_config, frozen_zero_stage
from tests.builders.processes import run_program
from tests.builders.tiny_lm import OPTIM, tiny_lm


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("zero3") / "out.json"
        built = out.with_name("extensions")
        run_program("tests/programs/zero3.py", out, ranks=ranks, TORCH_EXTENSIONS_DIR=str(built))
        found[ranks] = json.loads(out.read_text()) | {"built": built.exists()}
    return found


@pytest.mark.slow
def test_parameters_are_partitioned(runs):
    assert runs[2]["world"] == 2
    assert runs[1]["local"] == runs[1]["total"] == runs[2]["total"]
    # the odd element of a tensor is padding
    assert runs[2]["local"] == pytest.approx(runs[2]["total"] / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="not on a GPU, where DeepSpeed may use operations of its own")
def test_nothing_is_compiled(runs):
    """DeepSpeed's shared-memory collectives take minutes to compile, and nothing here uses them."""
    assert not runs[1]["built"] and not runs[2]["built"]


@pytest.mark.slow
def test_garbage_is_not_collected_where_weights_are_about_to_be_read(runs):
    """It takes longer than reading them, and PPO reads them in each step."""
    assert [runs[n]["collected"] for n in (1, 2)] == [0, 0]


@pytest.mark.slow
def test_a_step_of_one_model_leaves_the_other_unchanged(runs):
    assert [runs[n]["crossed"] for n in (1, 2)] == [0, 0]


@pytest.mark.slow
def test_two_ranks_equal_one(runs):
    assert runs[2]["grad_norm"] == pytest.approx(runs[1]["grad_norm"], rel=1e-4)
    for name, one in runs[1]["weights"].items():
        torch.testing.assert_close(torch.tensor(runs[2]["weights"][name]), torch.tensor(one), atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_zero3_equals_plain_pytorch(runs):
    """The same three steps by hand: mean of four micro-batch losses, clipping, AdamW."""
    data = torch.randint(1, 64, (3, 8, 10), generator=torch.Generator().manual_seed(3))
    model = tiny_lm(1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    )
    for step in range(3):
        optimizer.zero_grad()
        for micro in data[step].split(2):
            (model(input_ids=micro, labels=micro).loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
        optimizer.step()
    for name, weight in model.named_parameters():
        found = torch.tensor(runs[1]["weights"][f"actor.{name}"])
        torch.testing.assert_close(found, weight.detach(), atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_a_saved_state_continues_to_the_same_weights_at_every_stage(tmp_path):
    run_program("tests/programs/engine_state.py", tmp_path, ranks=2)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 8 and all(all(facts) for facts in found.values()), found  # loaded, then equal; and it moved


def test_overrides_are_merged_over_the_derived_settings():
    settings = deepspeed_config(
        Engine(zero_stage=2, overrides={"zero_optimization": {"reduce_bucket_size": 7}}),
        Optim(max_grad_norm=0.5),
        micro_batch=3,
        accumulation=4,
    )
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5


def test_where_frozen_models_are_whole(monkeypatch):
    """By their share of the GPU that they would be on; on CPU always, except with offload."""
    gib = 1 << 30
    assert frozen_zero_stage(Engine(), 50 * gib) == frozen_zero_stage(Engine(zero_stage=2, offload=True), 50 * gib) == 0
    assert (
        frozen_zero_stage(Engine(offload=True), 1)
        == frozen_zero_stage(Engine(frozen_zero_stage=3, zero_stage=0), 1)
        == 3
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * gib))
    assert [frozen_zero_stage(Engine(), n * gib) for n in (7, 9)] == [0, 3]
    assert frozen_zero_stage(Engine(frozen_zero_stage=0, offload=True), 50 * gib) == 0
    assert frozen_zero_stage(Engine(zero_stage=2), 50 * gib) == 0


@pytest.mark.slow
def test_padding_of_shards_is_no_weight():
    """It is memory that nobody has written, and may hold a NaN, for which PPO was ended."""
    found = json.loads(run_program("tests/programs/training/padding.py", ranks=2).splitlines()[-1])
    assert found["counted"] == found["numel"] and found["nan"] == 0
