"""Training of a reward model of 1.5B parameters: tokens per second, and the share of the GPU's peak that they take.

    python -m benchmarks.utilisation [--pairs 8] [--tokens 512] [--compile] [--out FILE]

The model has the sizes of Qwen2.5-1.5B and random weights, which take as long as trained ones. Pairs are random tokens:
a prompt and two responses of equal lengths, so that nothing is padded. A step is `rm.train.train_step` with all
weights trained in bfloat16, float32 master weights and AdamW.

Operations are those that the losses need (2 for each weight of a matrix and token, thrice for forward and backward
pass, and attention over the tokens that each one reads), not those that are done. The embedding takes none, and the LM
head only where the loss reads log-probs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from core.config import Engine as EngineSettings
from core.config import Model, Optim, RewardTraining, RewardVariant
from core.files import write_json
from core.training.distributed import device, init_distributed
from core.training.engine import Engine
from rm.pairs import Pair
from rm.train import train_step
from rm.variants import build

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second of the SXM cards, from NVIDIA's data sheets."""
SHAPES = {
    "1.5B": dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "tiny": dict(
        vocab_size=49152, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
}  # fmt: skip
LOSSES = {
    "BT": RewardVariant(head="mlp"),
    "GRM sft": RewardVariant(text_regulariser="sft", alpha=0.01, head="mlp"),
}


def save_model(shape: str, tokenizer: Path, folder: Path) -> None:
    """A model with random weights and the tokenizer of another folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with device():
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)).bfloat16()
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder)


def operations(shape: str, loss: str, pairs: int, tokens: int) -> float:
    """Of one step on pairs whose prompt and responses have `tokens` tokens each."""
    size = SHAPES[shape]
    hidden, layers = size["hidden_size"], size["num_hidden_layers"]
    keys = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * size["intermediate_size"])
    read = 3 * tokens * tokens / 2 + 2 * tokens * tokens  # by the causal attention of three parts, two after a prompt
    logits = 2 * hidden * size["vocab_size"] * tokens if LOSSES[loss].text_regulariser == "sft" else 0
    return 3 * pairs * (2 * weights * 3 * tokens + 4 * hidden * layers * read + logits)


def measure(folder: Path, loss: str, pairs: int, tokens: int, steps: int, compile: bool = False) -> dict:
    """Median seconds of a step, and the most memory that torch held, in GiB."""
    draw = torch.Generator().manual_seed(1)
    ids = lambda: torch.randint(1000, 40_000, (tokens,), generator=draw).tolist()  # noqa: E731
    rm = RewardTraining(base=Model(path=str(folder), attention="sdpa"), global_batch=pairs, micro_batch=pairs)
    settings = EngineSettings(processes=1, zero_stage=0, dtype="bfloat16", compile=compile)
    model, _ = build(rm, settings, LOSSES[loss], seed=1)
    engine = Engine(model, settings, micro_batch=pairs, optim=Optim(lr=1e-6, schedule="constant"), total_steps=steps)
    seconds = []
    for _ in range(steps):
        batch = [Pair(ids(), ids(), ids()) for _ in range(pairs)]
        started = time.perf_counter()
        train_step(engine, model, LOSSES[loss], batch, None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"seconds": median(seconds[2:]), "memory_gib": round(peak, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt, and of each response")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="as engine.compile")
    parser.add_argument("--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    init_distributed()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((rate for name, rate in PEAKS.items() if name in card), None)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(options.shape, options.tokenizer, Path(folder))
        for loss in LOSSES:
            row = measure(Path(folder), loss, options.pairs, options.tokens, options.steps, options.compile)
            rate = operations(options.shape, loss, options.pairs, options.tokens) / row["seconds"]
            tokens = 3 * options.pairs * options.tokens / row["seconds"]
            row |= {"loss": loss, "tokens_per_second": round(tokens), "tflops": round(rate / 1e12, 1)}
            row |= {"of_peak": round(rate / peak, 3) if peak else None}
            print(json.dumps(row), flush=True)
            found.append(row)
            torch.cuda.empty_cache()
    about = {"device": card, "torch": torch.__version__, **{k: str(v) for k, v in vars(options).items() if k != "out"}}
    if options.out:
        write_json(options.out, {"about": about, "rows": found})


if __name__ == "__main__":
    main()
