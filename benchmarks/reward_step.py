"""Step time and peak memory of GRM `sft` against Bradley-Terry on the same batches.

    python -m benchmarks.reward_step [--out benchmarks/reward_step.md]

Steps of the two alternate in one process, so that whatever else the machine does hits both; memory is the peak of a
process that trains with one of them alone.
Pairs are random tokens in the proportions of HH-RLHF: 120 of prompt, 45 and 55 of responses.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import cast

import torch

from core.config import RewardVariant
from core.data.chat import ChatTokenizer
from rm.heads import make_head
from rm.model import RewardModel
from rm.objective import pair_losses
from rm.pairs import Pair

LOSSES = {"BT": RewardVariant(), "GRM sft": RewardVariant(text_regulariser="sft", alpha=0.01)}
SHAPES = {
    "SmolLM2-135M, vocabulary 49k": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
    ),
    # Gemma-2B with its hidden size cut from 2048 to 128: the trunk keeps 3.5 times the parameters of the LM head.
    "tiny, vocabulary 256k": dict(
        vocab_size=256000, hidden_size=128, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1,
    ),
}  # fmt: skip
PAIRS, PROMPT, CHOSEN, REJECTED = 8, 120, 45, 55


class _Tokenizer:
    """All of a tokenizer that a training step on token ids reads."""

    pad_id = 0


def build(shape: str) -> tuple[RewardModel, torch.optim.Optimizer]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, attn_implementation="sdpa")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = RewardModel(LlamaForCausalLM(config).bfloat16(), "mlp", cast(ChatTokenizer, _Tokenizer()))
    model.head = make_head("mlp", config.hidden_size)
    model.to(where).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)


def batches(shape: str, count: int) -> list[list[Pair]]:
    top, draw = SHAPES[shape]["vocab_size"], torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(1, top, (n,), generator=draw).tolist()  # noqa: E731
    return [[Pair(ids(PROMPT), ids(CHOSEN), ids(REJECTED)) for _ in range(PAIRS)] for _ in range(count)]


def step(model: RewardModel, optimiser: torch.optim.Optimizer, variant: RewardVariant, batch: list[Pair]) -> float:
    """Seconds."""
    started = time.perf_counter()
    optimiser.zero_grad()
    pair_losses(model, model, variant, batch)["loss"].backward()
    optimiser.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def times(shape: str, rounds: int) -> dict[str, list[float]]:
    model, optimiser = build(shape)
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    for number, batch in enumerate(batches(shape, rounds + 1)):
        for name, variant in LOSSES.items():
            seconds = step(model, optimiser, variant, batch)
            if number:  # the first round allocates
                found[name].append(seconds)
    return found


def memory(shape: str, loss: str) -> float:
    """Peak of a process that trains with `loss`, MiB."""
    model, optimiser = build(shape)
    for batch in batches(shape, 3):
        step(model, optimiser, LOSSES[loss], batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--memory", nargs=2, metavar=("SHAPE", "LOSS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(*options.memory)))
        return
    rows = [
        "| model | loss | seconds per step | against BT | peak memory, MiB | against BT |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape in SHAPES:
        command = [sys.executable, "-m", "benchmarks.reward_step", "--memory", shape]
        peaks = {name: json.loads(subprocess.check_output([*command, name])) for name in LOSSES}
        seconds = times(shape, options.rounds)
        for name in LOSSES:
            ratio = median(a / b for a, b in zip(seconds[name], seconds["BT"], strict=True))
            rows.append(
                f"| {shape} | {name} | {median(seconds[name]):.2f} | {ratio:.2f} | {peaks[name]:.0f} "
                f"| {peaks[name] / peaks['BT']:.2f} |"
            )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    text = "\n".join([
        "# Time and memory of a training step, GRM against BT", "",
        f"`python -m benchmarks.reward_step` with torch {torch.__version__} on {where}. A step trains all weights "
        f"on {PAIRS} pairs of {PROMPT} prompt tokens and {CHOSEN} and {REJECTED} response tokens, in bfloat16 with "
        f"AdamW. Steps of the two losses alternate. The seconds are medians of {options.rounds} steps, and ratios are "
        "medians of the ratios of neighbouring steps.", "", *rows,
    ])  # fmt: skip
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
