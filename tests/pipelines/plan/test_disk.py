"""Bytes on disk against files that are written."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.config import Model
from core.data.chat import ChatTokenizer
from core.files import write_table
from pipelines.plan.disk import ROW, TOKEN, TOKENIZER, Disk, disk_of, disk_warnings
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
    ppo |= {"keep_rollouts_mib": 0}
    found = sizes(ppo=ppo)
    shape, adapters = found.policy, found.actor_trained
    states = 12 * (adapters + shape.layer_params) + 2 * (2 * shape.params - shape.layer_params)  # bfloat16, stage 3
    assert state_bytes(found) == states
    disk = disk_of(found, "ppo")
    kept = 2 * adapters * 2 + shape.params * 2 + TOKENIZER + states
    assert disk.left == pytest.approx(kept, rel=0.01)
    gone = disk_of(sizes(ppo=ppo | {"keep_state": False}), "ppo")
    assert gone.left == pytest.approx(kept - states, rel=0.01) and gone.peak >= gone.left
    rollouts = 8 * 64 * (ROW + TOKEN * found.lengths.response_tokens)
    for mib, expected in ((256, rollouts), (0.125, 0.125 * (1 << 20))):
        assert disk_of(sizes(ppo=ppo | {"keep_rollouts_mib": mib}), "ppo").left == pytest.approx(disk.left + expected)


def test_a_table_of_rollouts_takes_less_than_is_counted(tmp_path):
    """Of responses of 20 tokens, with log-probs that nothing compresses."""
    g, n, tokens = torch.Generator().manual_seed(1), 200, 20
    of_tokens = ("logprobs", "ref_logprobs", "sampler_logprobs")
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {i}?"}], "response": "word " * tokens, "proxy": float(i),
         "token_ids": torch.randint(0, 49152, (tokens,), generator=g).int().numpy(), "prompt_id": f"{i:016x}",
         **{name: torch.randn(tokens, generator=g).numpy() for name in of_tokens}}
        for i in range(n)
    ]  # fmt: skip
    write_table(tmp_path / "step-000001.parquet", rows)
    assert 0.5 * n * (ROW + TOKEN * tokens) < size_of(tmp_path) < n * (ROW + TOKEN * tokens)


def test_a_disk_that_is_too_small_is_warned_of(tmp_path):
    peak, lines = disk_warnings({"a": Disk(1e6, 3e6), "b": Disk(1e6, 1e6)}, tmp_path / "not" / "there")
    assert (peak, lines) == (3e6, [])
    peak, (line,) = disk_warnings({"a": Disk(1e18, 1e18), "b": Disk(1, 5e18)}, tmp_path)
    assert peak == 6e18 and "needs 6000000000.0 GB" in line
