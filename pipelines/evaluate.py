"""Stage `eval`: the reference and every PPO checkpoint on held-out prompts: proxy, gold and KL.

Samples are drawn at the training temperature, so that rewards and KL speak of the same distribution. Gold is
read here for the first time after the labels.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bon.gains import scale
from bon.pools import Pools
from bon.scores import optimised_rewards, read_pools
from core import starting
from core.config import Config, Model
from core.data.chat import ChatTokenizer
from core.data.rows import EvaluationRow, ResponseRow
from core.data.splits import read_split
from core.data.streams import stream_seed
from core.errors import ArtefactError
from core.files import open_tensors, read_table, write_table
from core.generation.local import Generator
from core.models import CausalLM
from core.models.loading import load_causal_lm
from core.training.distributed import device
from core.training.weights import named_weights
from pipelines.policy_kl import measure_kl
from rm.combine import proxy_reward
from rm.gold import load_gold, score_samples, with_reading
from rm.model import RewardModel


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    checkpoints = {0: None} | {int(p.name.split("-")[1]): p for p in sorted((inputs["ppo"] / "checkpoints").iterdir())}
    sample_checkpoints(cfg, inputs["prompts"], checkpoints, out)
    gc.collect()
    rows = [row for step in checkpoints for row in read_table(out / "steps" / f"{step:04d}.parquet")]
    tokenizer, responses = ChatTokenizer(cfg.policy), cast(list[ResponseRow], rows)
    rewards = proxy_scores(cfg, inputs["rm"], responses)
    gold = load_gold(cfg.gold)
    golds = score_samples(gold, responses).tolist()
    drop = ("split", "token_ids", "tokenizer")
    table = [
        {"run": cfg.run.name, **{k: v for k, v in row.items() if k not in drop}, "proxy": p, "gold": g}
        for row, p, g in zip(rows, rewards, golds, strict=True)
    ]
    write_table(out / "rl_eval.parquet", table, EvaluationRow)
    pools = read_pools(inputs["bon"], cfg.ppo.members)
    metrics = summary(table, pools, optimised_rewards(inputs["rm"], pools, cfg.ppo.members, cfg.ppo.combine))
    return with_reading(metrics, gold, tokenizer, responses)


def proxy_scores(cfg: Config, reward_models: Path, rows: list[ResponseRow]) -> list[float]:
    """Raw rewards by what PPO optimised, one reward model or an ensemble."""
    raw, units = [], []
    for name in cfg.ppo.members:
        model = RewardModel.from_pretrained(reward_models / name, attention=cfg.policy.attention)
        raw.append(model.score_rows(rows, progress=f"eval: {name}").cpu())
        units.append((model.mean, model.std))
    return proxy_reward(torch.stack(raw), units, cfg.ppo.combine).tolist()


def sample_checkpoints(cfg: Config, prompts: Path, checkpoints: dict[int, Path | None], out: Path) -> None:
    """A table for each checkpoint under `steps/`, with KL; existing tables are kept, so that a killed stage resumes."""
    tokenizer = ChatTokenizer(cfg.policy)
    rows = read_split(prompts, "eval", cfg.eval.prompts)
    ids = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    waiting = [s for s in checkpoints if not (out / "steps" / f"{s:04d}.parquet").exists()]
    if not waiting:
        return
    (out / "steps").mkdir(exist_ok=True)
    generator = Generator(cfg.policy, cfg.generation, tokenizer)
    reference = _load(cfg, cfg.policy).eval().to(device())
    starting.working()
    for step in tqdm(waiting, desc="eval: checkpoints", unit="policy"):
        folder = checkpoints[step]
        policy = load_policy(cfg, folder) if folder else reference
        if folder:
            generator.sync(named_weights(policy))
        seed = stream_seed(cfg.run.seed, "eval", step)
        groups = generator.generate(ids, n=cfg.eval.samples, seed=seed)
        samples = [
            {
                "step": step, "prompt_id": row["prompt_id"], "sample_id": k, "split": row["split"],
                "prompt": row["prompt"], "response": c.text, "token_ids": c.token_ids,
                "n_tokens": len(c.token_ids), "finished": c.finished, "logp_sampler": float(sum(c.logprobs)),
                "tokenizer": tokenizer.fingerprint,
            }
            for row, group in zip(rows, groups, strict=True)
            for k, c in enumerate(group)
        ]  # fmt: skip
        kls = measure_kl(policy, reference, tokenizer, samples, cfg.generation.temperature, cfg.eval.micro_batch)
        write_table(out / "steps" / f"{step:04d}.parquet", [{**s, **kl} for s, kl in zip(samples, kls, strict=True)])


def load_policy(cfg: Config, folder: Path) -> nn.Module:
    """A checkpoint of stage `ppo`: an adapter on the policy, or a whole model."""
    if not (folder / "adapter_config.json").is_file():
        whole = cfg.policy.model_copy(update={"path": str(folder), "revision": None})
        return _load(cfg, whole).eval().to(device())
    from peft import PeftModel

    lm = PeftModel.from_pretrained(_load(cfg, cfg.policy), folder, autocast_adapter_dtype=False)
    with open_tensors(folder / "adapter_model.safetensors") as file:
        saved = set(file.keys())
    wanted = {n.replace(".default.", ".") for n, _ in lm.named_parameters() if "lora_" in n}
    if saved != wanted:
        raise ArtefactError(f"{folder}: its adapter does not fit the policy, for example {sorted(saved ^ wanted)[:2]}")
    return lm.eval().to(device())


def _load(cfg: Config, model: Model) -> CausalLM:
    return load_causal_lm(model, dtype=cfg.generation.vllm.dtype, float32_head=cfg.engine_of("ppo").float32_head)


def summary(rows: list[dict], pools: Pools, proxy: np.ndarray) -> dict:
    """The last checkpoint against the reference, in the unit of the report, and KL, length and ends of each.

    Args:
        rows: of `rl_eval.parquet`.
        proxy: [P, N], the pools by what PPO optimised.
    """
    units = {"proxy": scale(proxy), "gold": scale(pools.gold)}
    steps = sorted({row["step"] for row in rows})
    prompts = sorted({row["prompt_id"] for row in rows})

    def of_prompts(step: int, column: str) -> np.ndarray:
        values: dict[str, list[float]] = {p: [] for p in prompts}
        for row in rows:
            if row["step"] == step:
                values[row["prompt_id"]].append(float(row[column]))
        return np.array([np.mean(values[p]) for p in prompts])

    table = [
        {
            "step": step,
            "kl": float(of_prompts(step, "kl_rb").mean()),
            "tokens": float(of_prompts(step, "n_tokens").mean()),
            "eos_rate": float(of_prompts(step, "finished").mean()),
        }
        for step in steps
    ]
    change = {m: (of_prompts(steps[-1], m) - of_prompts(steps[0], m)) / unit for m, unit in units.items()}
    parts = [f"{m} {c.mean():+.2f} (SE {c.std(ddof=1) / math.sqrt(len(c)):.2f})" for m, c in change.items()]
    return {
        "headline": f"step {steps[-1]} against the reference on {len(prompts)} prompts, in SD within prompts: "
        f"{', '.join(parts)}, KL {table[-1]['kl']:.2f} nats",
        "table": table,
        **{f"{m}_change": float(c.mean()) for m, c in change.items()},
    }
