"""A finished study of some reward models and a policy, with planted scores in place of models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bon.scores import write_scores
from core.config import Config
from core.files import write_json, write_jsonl, write_table
from rm.checkpoints.layout import MERGED_FORMAT

P, N = 30, 32
STEPS = 6


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def manifest(folder: Path, seconds: float, **metrics: object) -> None:
    facts = {"config": {}, "inputs": {}, "outputs": [], "seconds": seconds}
    facts["metrics"] = {"headline": "done", **metrics}
    write_json(folder / "manifest.json", facts | {"code": {"commit": "abc"}, "packages": {"torch": "2"}})


def shared_stages(cfg: Config) -> None:
    """Stages prompts to bon: gold turns where z exceeds 1, which the proxies do not see."""
    run, rng = cfg.run_dir, np.random.default_rng(0)
    for stage in ("prompts", "preferences", "rm", "bon"):
        (run / stage).mkdir(parents=True)
    eval_ids, train_ids = ([f"{kind}{i:02d}" for i in range(P)] for kind in ("e", "t"))
    prompts = [{"prompt_id": i, "split": "eval", "prompt": chat(f"evaluated {i}"), "num_tokens": 9,
                "order": 0.5} for i in eval_ids]  # fmt: skip
    prompts += [{"prompt_id": i, "split": "rm_train", "prompt": chat(f"trained on {i}"), "num_tokens": 9,
                 "order": 0.5} for i in train_ids]  # fmt: skip
    write_table(run / "prompts" / "prompts.parquet", prompts)
    manifest(run / "prompts", 1)
    pairs = [
        {"pair_id": i, "prompt_id": i, "split": "rm_train", "chosen": "a", "rejected": "b", "flipped": False,
         "weight": 1.0, "gold_chosen": 1.0, "gold_rejected": 0.0, "source": "policy", "margin": None,
         "prompt": chat(f"trained on {i}")} for i in train_ids
    ]  # fmt: skip
    write_table(run / "preferences" / "pairs.parquet", pairs)
    manifest(run / "preferences", 2, pairs={"rm_train": P})
    share = {"mean": 0.71, "lo": 0.62, "hi": 0.79, "n": 24}
    trained = {"pairs": P, "accuracy_gold": share, "accuracy_label": share, "length_correlation": 0.2, "seconds": 3.0}
    manifest(run / "rm", 3, judge="gold", variants=dict.fromkeys(cfg.rm.variants, trained))
    z = rng.normal(size=(P, N))
    scores = {"gold": z - 0.8 * np.maximum(z - 1, 0) ** 2 + 0.3 * rng.normal(size=(P, N)) + rng.normal(size=(P, 1))}
    for k, name in enumerate(cfg.rm.variants):
        reward_model(run / "rm" / name, rng)
        scores[name] = (1 + k) * z + 0.4 * rng.normal(size=(P, N)) + rng.normal(size=(P, 1))
    samples = [
        {"prompt_id": i, "sample_id": k, "prompt": chat(f"evaluated {i}"), "response": f"{i}.{k}", "split": "eval",
         "token_ids": [1, 2],
         "n_tokens": int(rng.integers(5, 50)), "finished": True, "logp_sampler": -float(rng.uniform(5, 40))}
        for i in eval_ids for k in range(N)
    ]  # fmt: skip
    write_table(run / "bon" / "samples.parquet", samples)
    for name, values in scores.items():
        write_scores(run / "bon" / "scores" / f"{name}.parquet", samples, values.ravel().tolist())
    manifest(run / "bon", 4)


def reward_model(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir()
    write_json(folder / "config.json", {"num_hidden_layers": 2})
    write_json(
        folder / "reward_model.json",
        {"format": MERGED_FORMAT, "head": "mlp", "tokenizer": "0", "mean": 0.5, "std": 2.0},
    )
    save_file({"model.layers.0.weight": torch.zeros(3, 2)}, folder / "model.safetensors")
    deltas = rng.normal(0.5, 1, size=24).tolist()
    rows = [
        {"prompt_id": str(i), "pair_id": str(i), "reward_chosen": d, "reward_rejected": 0.0, "flipped": False}
        for i, d in enumerate(deltas)
    ]
    write_table(folder / "val.parquet", rows)
    write_jsonl(folder / "train.jsonl", [{"step": s, "reward_loss": 0.7 / s, "accuracy": 0.5} for s in (1, 2)])


def policy_stages(folder: Path, seed: int = 0) -> None:
    """Stages ppo and eval of a policy whose proxy rises with every step, while gold turns."""
    rng = np.random.default_rng(seed)
    for stage in ("ppo", "eval"):
        (folder / stage).mkdir(parents=True, exist_ok=True)
    log = [
        {"step": s, "proxy_mean": 0.1 * s, "proxy_se": 0.1, "kl_nats_per_response": 0.4 * s, "kl_coef": 0.0,
         "eos_rate": 0.9} for s in range(1, STEPS)
    ]  # fmt: skip
    write_jsonl(folder / "ppo" / "metrics.jsonl", log)
    manifest(folder / "ppo", 5, first=log[0], last=log[-1])
    rows = []
    for step in range(STEPS):
        d = (0.4 * step) ** 0.5
        for i in range(P):
            kl = 0.4 * step + 0.01 * rng.normal()
            rows.append({
                "run": "r", "step": step, "prompt_id": f"e{i:02d}", "sample_id": 0,
                "prompt": chat(f"evaluated e{i:02d}"), "response": f"step {step} of {i}",
                "n_tokens": 20, "finished": True, "logp_sampler": -30.0, "logp": -30.1, "kl_rb": kl,
                "kl_k1": kl + 0.05 * rng.normal(), "kl_k3": kl, "proxy": d + rng.normal(), "gold": d * (1 - d / 2),
            })  # fmt: skip
    write_table(folder / "eval" / "rl_eval.parquet", rows)
    manifest(folder / "eval", 6)
