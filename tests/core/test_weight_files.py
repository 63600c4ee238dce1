"""Saved weights in one file or several of a stated size."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from core.config import Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.models.loading import load_causal_lm, save_lm
from core.models.weight_files import INDEX, write_weights
from tests.builders.policies import tiny_policy

MOST = 40_000


@pytest.fixture
def lm(tokenizer_path, tmp_path):
    return AutoModelForCausalLM.from_pretrained(tiny_policy("llama", tokenizer_path, tmp_path / "source"))


@pytest.fixture
def saved(lm, tokenizer_path, tmp_path):
    """The model in files of at most 40 kB, and its weights."""
    save_lm(
        tmp_path / "lm",
        lm.config,
        lm.named_parameters(),
        ChatTokenizer(Model(path=str(tokenizer_path))),
        shard_bytes=MOST,
    )
    return tmp_path / "lm"


def test_files_have_the_stated_size_and_the_names_that_transformers_gives(saved, lm):
    index = json.loads((saved / INDEX).read_text())
    files = sorted(file.name for file in saved.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] and len(files) > 3
    held = {}
    for name in files:
        with safe_open(saved / name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= MOST or len(tensors) == 1
        held |= dict.fromkeys(tensors, name)
    assert held == index["weight_map"] and index["metadata"]["total_size"] == sum(p.nbytes for p in lm.parameters())


def test_every_reader_reads_them(saved, lm):
    theirs, ours = AutoModelForCausalLM.from_pretrained(saved), load_causal_lm(Model(path=str(saved)), dtype="float32")
    for read in (theirs, ours):
        assert all(torch.equal(p, q) for p, q in zip(read.parameters(), lm.parameters(), strict=True))


def test_a_file_that_is_missing_or_lacks_a_tensor_is_refused(saved):
    last = max(saved.glob("model-*.safetensors"))
    with safe_open(last, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    lost = tensors.popitem()[0]
    save_file(tensors or {"other": torch.zeros(1)}, last, metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match=f"does not fit its architecture: missing .*{lost}"):
        load_causal_lm(Model(path=str(saved)), dtype="float32")
    last.unlink()
    with pytest.raises(ArtefactError, match="damaged, cut short or not there"):
        load_causal_lm(Model(path=str(saved)), dtype="float32")


def test_a_small_model_is_one_file_and_no_file_of_another_model_stays(saved, tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    write_weights(saved, weights.items())
    assert [file.name for file in saved.glob("model*")] == ["model.safetensors"]
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "expected", metadata={"format": "pt"})
    assert (saved / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    write_weights(saved, weights.items(), 10)
    assert sorted(f.name for f in saved.glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX,
    ]  # fmt: skip


def test_no_more_than_a_file_is_in_memory(tmp_path):
    """Of tensors that come one after the other, those of written files are given up."""
    import weakref

    alive: list[weakref.ref] = []

    def weights():
        for i in range(20):
            tensor = torch.full((250,), float(i))  # 1,000 bytes
            alive.append(weakref.ref(tensor))
            yield str(i), tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= 4

    write_weights(tmp_path, weights(), 3000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 7
