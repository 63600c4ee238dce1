"""Bytes on disk against files that are written."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from core.config import Model
from core.data.chat import ChatTokenizer
from pipelines.plan.disk import TOKENIZER, Disk, disk_of, disk_warnings
from pipelines.plan.training import state_bytes
from rm.checkpoints.layout import save_reward_model
from rm.heads import make_head
from rm.model import RewardModel
from tests.builders.plan.sizes import TINY, sizes, tiny_shape


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_reward_model_takes_what_is_counted(tokenizer_path, tmp_path):
    tokenizer = ChatTokenizer(Model(path=str(tokenizer_path)))
    wide = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512}
    lm = LlamaForCausalLM(LlamaConfig(**TINY | wide, tie_word_embeddings=True)).bfloat16()
    model = RewardModel(lm, "linear", tokenizer)
    head = {name: weight.detach() for name, weight in make_head("linear", 128).named_parameters()}
    save_reward_model(tmp_path / "one", model, lm.named_parameters(), head)
    found = disk_of(sizes(tiny_shape(**wide), rm={"variants": {"one": {"head": "linear"}}}), "rm")
    assert found.left - TOKENIZER == pytest.approx(size_of(tmp_path / "one") - files_beside(tmp_path / "one"), rel=0.01)
    assert files_beside(tmp_path / "one") < TOKENIZER


def files_beside(folder: Path) -> int:
    return size_of(folder) - (folder / "model.safetensors").stat().st_size


def test_adapters_are_small_and_states_are_not():
    ppo = {"lora": {"rank": 2, "top_layers": 2}, "critic_trainable_layers": 1, "steps": 8, "save_every": 4}
    found = sizes(ppo=ppo)
    shape, adapters = found.policy, found.actor_trained
    states = 12 * (adapters + shape.layer_params) + 2 * (2 * shape.params - shape.layer_params)  # bfloat16, stage 3
    assert state_bytes(found) == states
    disk = disk_of(found, "ppo")
    kept = 2 * adapters * 2 + shape.params * 2 + TOKENIZER + states
    assert disk.left == pytest.approx(kept, rel=0.01)
    gone = disk_of(sizes(ppo=ppo | {"keep_state": False}), "ppo")
    assert gone.left == pytest.approx(kept - states, rel=0.01) and gone.peak >= gone.left


def test_a_disk_that_is_too_small_is_warned_of(tmp_path):
    peak, lines = disk_warnings({"a": Disk(1e6, 3e6), "b": Disk(1e6, 1e6)}, tmp_path / "not" / "there")
    assert (peak, lines) == (3e6, [])
    peak, (line,) = disk_warnings({"a": Disk(1e18, 1e18), "b": Disk(1, 5e18)}, tmp_path)
    assert peak == 6e18 and "needs 6000000000.0 GB" in line
