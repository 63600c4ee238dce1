"""Models read straight into ZeRO-3's shards on the ranks of torchrun: their weights, what is refused, and memory."""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from core import config
from core.errors import ArtefactError
from core.models.loading import load_causal_lm
from core.training import distributed
from core.training.engine import Engine, shards
from core.training.sharding import is_divided, num_bytes
from core.training.weights import named_weights
from tests.builders.policies import tiny_policy

FAMILIES = ("llama", "gemma2", "gemma3", "phi3", "gpt_neox", "opt", "gpt2", "qwen3")
LARGE = LlamaConfig(
    vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8,
    tie_word_embeddings=False,
)  # fmt: skip
SETTINGS = config.Engine(
    frozen_zero_stage=3, dtype="float32", overrides={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
)


def read(folder: Path, *, divided: bool, dtype: str = "float32", num_layers: int | None = None):
    divide = shards(SETTINGS, 3) if divided else None
    return load_causal_lm(config.Model(path=str(folder)), dtype=dtype, num_layers=num_layers, shards=divide)


def same(folder: Path, **options) -> bool:
    """Whether each weight is that of the model read whole, in number, order, type and value, and none is whole."""
    one, other = read(folder, divided=True, **options), read(folder, divided=False, **options)
    assert all(is_divided(p) and not p.numel() for p in one.parameters())
    assert num_bytes(one) == num_bytes(other)
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in other.parameters()]
    assert one.config.to_dict() == other.config.to_dict() and one.name_or_path == other.name_or_path
    pairs = zip(named_weights(one), named_weights(other), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def spoil(folder: Path, to: Path, change: Callable[[dict], object]) -> None:
    """A copy of a model with other tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})


def spoilt(folder: Path) -> dict[str, Path]:
    """Models that do not fit their architecture, and one whose tied weights stand in its files twice and differ."""
    llama, twice = folder / "llama", folder / "gpt2"
    kept, name = {}, "model.layers.1.mlp.up_proj.weight"
    cases: dict[str, tuple[Path, Callable[[dict], object]]] = {
        "missing": (llama, lambda w: w.pop(name)),
        "unexpected": (llama, lambda w: w.update(more=torch.zeros(2))),
        "other shape": (llama, lambda w: w.update({name: torch.zeros(2, 2)})),
        "tied twice": (twice, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1.0})),
    }
    for case, (of, change) in cases.items():
        kept[case] = folder / case
        if distributed.rank() == 0:
            spoil(of, kept[case], change)
    kept["cut short"] = folder / "cut short"
    if distributed.rank() == 0:
        spoil(llama, kept["cut short"], lambda w: None)
        weights = kept["cut short"] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    torch.distributed.barrier()
    return kept


def refusal(folder: Path) -> str:
    try:
        read(folder, divided=True)
    except ArtefactError as error:
        return str(error)
    return ""


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def growth(make: Callable[[], object], kept: list) -> int:
    """Bytes by which this rank's resident memory rises at most while `make` runs; what it makes stays."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, begins anew
    before = status("VmRSS")
    kept.append(make())
    return status("VmHWM") - before


def main(tokenizer: str, out: str) -> None:
    distributed.init_distributed()
    folder = Path(out)
    if distributed.rank() == 0:
        for family in FAMILIES:
            tiny_policy(family, Path(tokenizer), folder / family)
        LlamaForCausalLM(LARGE).save_pretrained(folder / "large", max_shard_size="40MB")
    torch.distributed.barrier()
    found: dict = {"families": {family: same(folder / family) for family in FAMILIES}}
    found["families"]["bfloat16"] = same(folder / "llama", dtype="bfloat16")
    found["families"]["one layer"] = same(folder / "llama", num_layers=1)
    cases = spoilt(folder)
    found["families"]["tied twice"] = same(cases.pop("tied twice"))
    found["refused"] = {case: refusal(path) for case, path in cases.items()}
    kept: list = []

    def engine(name: str = "large", *, divided: bool) -> Engine:
        return Engine(read(folder / name, divided=divided), SETTINGS, micro_batch=1)

    engine("llama", divided=False)  # what is imported and made for the first time is none of the model

    grown = {
        "into shards": growth(lambda: engine(divided=True), kept),
        "whole": growth(lambda: engine(divided=False), kept),
    }
    found["growth"] = {way: distributed.gather_rows([size]) for way, size in grown.items()}
    module = kept[0].module
    found |= {"files": len(list((folder / "large").glob("*.safetensors"))), "whole": num_bytes(module)}
    found |= {"layer": num_bytes(module.model.layers[0]), "ranks": distributed.world_size()}
    if distributed.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
