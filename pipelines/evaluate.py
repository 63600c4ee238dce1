"""Stage `eval`: the reference and every PPO checkpoint on held-out prompts: proxy, gold and KL.

Samples are drawn at the training temperature, so that rewards and KL speak of the same distribution. Gold is
read here for the first time after the labels.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bon.curves import curve, matrix, read_curves, write_curves
from bon.estimators import bootstrap_ci
from core.config import Config
from core.data.chat import ChatTokenizer, conversation
from core.data.splits import read_split
from core.data.streams import stream_seed
from core.errors import ArtefactError
from core.files import read_json, read_table, write_table
from core.generation.local import Generator
from core.models.loading import load_causal_lm
from core.training.distributed import device
from core.training.weights import named_weights
from pipelines.policy_kl import measure_kl
from pipelines.verdicts import checks, interval, verdicts
from rm.combine import proxy_reward, proxy_units
from rm.gold import load_gold, score_samples
from rm.model import RewardModel

ENDS = (("", "mean"), ("_lo", "lo"), ("_hi", "hi"))
"""Suffix of a column of the table -> column of the curve."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    checkpoints = {0: None} | {int(p.name.split("-")[1]): p for p in sorted((inputs["ppo"] / "checkpoints").iterdir())}
    sample_checkpoints(cfg, inputs["prompts"], checkpoints, out)
    gc.collect()
    rows = [row for step in checkpoints for row in read_table(out / "steps" / f"{step:04d}.parquet")]
    rewards, proxy = proxy_scores(cfg, inputs["rm"], [conversation(r["prompt"], r["response"]) for r in rows])
    golds = score_samples(load_gold(cfg.gold), rows).tolist()
    drop = ("split", "token_ids")
    table = [
        {"run": cfg.run.name, **{k: v for k, v in row.items() if k not in drop}, "proxy": p, "gold": g}
        for row, p, g in zip(rows, rewards, golds, strict=True)
    ]
    write_table(out / "rl_eval.parquet", table)
    bon = read_json(inputs["bon"] / "manifest.json")["metrics"]
    units = {"proxy": proxy, "gold": (bon["gold_mean"], bon["gold_std"]), "length": (0.0, 1.0)}
    return analyse(cfg, inputs, out, table, list(checkpoints), units)


def proxy_scores(cfg: Config, reward_models: Path, conversations: list) -> tuple[list[float], tuple[float, float]]:
    """Raw rewards by what PPO optimised, one reward model or an ensemble, and the mean and std of their unit."""
    raw, units = [], []
    for name in cfg.ppo.members:
        model = RewardModel.from_pretrained(reward_models / name, attention=cfg.policy.attention)
        raw.append(model.score(conversations, progress=f"eval: {name}").cpu())
        units.append((model.mean, model.std))
    rewards = proxy_reward(torch.stack(raw), units, cfg.ppo.combine)
    return rewards.tolist(), proxy_units(units, cfg.ppo.combine)


def sample_checkpoints(cfg: Config, prompts: Path, checkpoints: dict[int, Path | None], out: Path) -> None:
    """One table a checkpoint under `steps/`, with KL; those there already are kept, so that a killed stage goes on."""
    tokenizer = ChatTokenizer(cfg.policy)
    rows = read_split(prompts, "eval", cfg.eval.prompts)
    ids = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    waiting = [s for s in checkpoints if not (out / "steps" / f"{s:04d}.parquet").exists()]
    if not waiting:
        return
    (out / "steps").mkdir(exist_ok=True)
    generator = Generator(cfg.policy, cfg.generation, tokenizer)
    reference = load_causal_lm(cfg.policy, dtype=cfg.generation.vllm.dtype).eval().to(device())
    for step in tqdm(waiting, desc="eval: checkpoints", unit="policy"):
        policy = reference if step == 0 else load_policy(cfg, checkpoints[step])
        if step:
            generator.sync(named_weights(policy))
        seed = stream_seed(cfg.run.seed, "eval", step)
        groups = generator.generate(ids, n=cfg.eval.samples, seed=seed)
        samples = [
            {
                "step": step, "prompt_id": row["prompt_id"], "sample_id": k, "split": row["split"],
                "prompt": row["prompt"], "response": c.text, "token_ids": c.token_ids,
                "n_tokens": len(c.token_ids), "finished": c.finished, "logp_sampler": float(sum(c.logprobs)),
            }
            for row, group in zip(rows, groups, strict=True)
            for k, c in enumerate(group)
        ]  # fmt: skip
        kls = measure_kl(policy, reference, tokenizer, samples, cfg.generation.temperature, cfg.eval.micro_batch)
        write_table(out / "steps" / f"{step:04d}.parquet", [{**s, **kl} for s, kl in zip(samples, kls, strict=True)])


def load_policy(cfg: Config, folder: Path) -> nn.Module:
    """A checkpoint of stage `ppo`: an adapter on the policy, or a whole model."""
    dtype = cfg.generation.vllm.dtype
    if not (folder / "adapter_config.json").is_file():
        return (
            load_causal_lm(cfg.policy.model_copy(update={"path": str(folder), "revision": None}), dtype=dtype)
            .eval()
            .to(device())
        )
    from peft import PeftModel
    from safetensors import safe_open

    lm = PeftModel.from_pretrained(load_causal_lm(cfg.policy, dtype=dtype), folder, autocast_adapter_dtype=False)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    wanted = {n.replace(".default.", ".") for n, _ in lm.named_parameters() if "lora_" in n}
    if saved != wanted:
        raise ArtefactError(f"{folder}: its adapter does not fit the policy, for example {sorted(saved ^ wanted)[:2]}")
    return lm.eval().to(device())


def analyse(
    cfg: Config,
    inputs: dict[str, Path],
    out: Path,
    rows: list[dict],
    steps: list[int],
    units: dict[str, tuple[float, float]],
) -> dict:
    """The table of checkpoints, curves beside those of best-of-n, changes from the reference, verdicts and checks."""
    by_step = {s: [r for r in rows if r["step"] == s] for s in steps}
    columns = {"proxy": "proxy", "gold": "gold", "length": "n_tokens"}
    values = {  # [P, steps], each prompt's mean, in units of the reference's samples
        m: np.stack([(matrix(by_step[s], c).mean(axis=1) - units[m][0]) / units[m][1] for s in steps], axis=1)
        for m, c in columns.items()
    }
    kls = np.stack([matrix(by_step[s], "kl_rb").mean(axis=1) for s in steps], axis=1)
    draws, seed = cfg.eval.bootstrap, stream_seed(cfg.run.seed, "bootstrap")
    common = {
        "rm": cfg.ppo.label, "method": "ppo", "xs": steps, "kl": kls.mean(axis=0), "kl_kind": "rb",
        "pool": cfg.eval.samples, "draws": draws, "seed": seed,
    }  # fmt: skip
    curves = {m: curve(v, metric=m, **common) for m, v in values.items()}
    bon_rows = read_curves(inputs["bon"] / "curves.csv")
    write_curves(out / "curves.csv", bon_rows + [row for part in curves.values() for row in part])
    table = [
        {
            "step": s, "kl": float(kls[:, j].mean()), "kl_se": float(kls[:, j].std(ddof=1) / math.sqrt(len(kls))),
            **{f"{m}{end}": curves[m][j][k] for m in ("proxy", "gold") for end, k in ENDS},
            "tokens": float(values["length"][:, j].mean()),
            "eos_rate": float(np.mean([r["finished"] for r in by_step[s]])), "prompts": len(kls),
        }
        for j, s in enumerate(steps)
    ]  # fmt: skip
    changes = {m: change(values[m][:, 0], values[m][:, -1], draws, seed) for m in ("proxy", "gold")}
    p, g = changes["proxy"], changes["gold"]
    return {
        "headline": f"step {steps[-1]} against the reference on {len(kls)} prompts, in SD: proxy {p['mean']:+.2f} "
        f"{interval(p)}, gold {g['mean']:+.2f} {interval(g)}, KL {table[-1]['kl']:.2f}",
        "table": table,
        "proxy_units": units["proxy"],
        "proxy_change": p,
        "gold_change": g,
        "verdicts": verdicts(table, p, g, values["gold"], steps, draws, seed),
        "checks": checks(inputs["prompts"], rows, table, bon_rows),
    }  # fmt: skip


def change(first: np.ndarray, last: np.ndarray, draws: int, seed: int) -> dict[str, float]:
    """Mean of the paired difference over prompts [P], its standard error and 95% interval."""
    difference = last - first
    mean, lo, hi = bootstrap_ci(difference[:, None], draws, np.random.default_rng(seed))
    se = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    return {"mean": float(mean[0]), "se": se, "lo": float(lo[0]), "hi": float(hi[0])}
