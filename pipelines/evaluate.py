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
from core.artefacts import ArtefactError, read_json, read_table, write_table
from core.batching import pad_right
from core.config import Config
from core.data.chat import ChatTokenizer, stream_seed
from core.generation.local import Generator
from core.generation.pool import conversation
from core.models.layers import LowerLayers, hidden_states, load_causal_lm, shared_depth
from core.training.engine import device, named_weights
from pipelines.prompts import read_split
from pipelines.verdicts import checks, interval, verdicts
from ppo.math import exact_kl, kl_k1, kl_k3
from rm.combine import proxy_reward, proxy_units
from rm.gold import load_gold, score_samples
from rm.model import RewardModel

ENDS = (("", "mean"), ("_lo", "lo"), ("_hi", "hi"))
"""Suffix of a column of the table -> column of the curve."""

LOGIT_ROWS = 512
"""Rows of the two models' logits that exist at a time: twice 512 x 49k in float32 are 200 MB."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    checkpoints = {0: None} | {int(p.name.split("-")[1]): p for p in sorted((inputs["ppo"] / "checkpoints").iterdir())}
    sample_checkpoints(cfg, inputs["prompts"], checkpoints, out)
    gc.collect()
    rows = [row for step in checkpoints for row in read_table(out / "steps" / f"{step:04d}.parquet")]
    rewards, proxy = proxy_scores(cfg, inputs["rm"], [conversation(r) for r in rows])
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


@torch.no_grad()
def measure_kl(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: ChatTokenizer,
    samples: list[dict],
    temperature: float,
    micro: int,
) -> list[dict[str, float]]:
    """KL(pi || pi_0) in nats per response, three ways, for responses sampled from `policy`.

    kl_k1 and kl_k3 from log-probs of the sampled tokens; kl_rb sums the exact KL of each next-token distribution
    (Rao-Blackwell, Amini et al. 2504.10637), which is unbiased too and varies less.
    """
    sequences = [(tokenizer.prompt_ids(s["prompt"]), list(s["token_ids"])) for s in samples]
    # Below the adapters both are the same model: those layers are run once.
    depth = shared_depth(policy.requires_grad_(False), reference.requires_grad_(False))
    lower = LowerLayers(reference, depth) if depth else None
    order = sorted(range(len(samples)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    found: list[dict[str, float]] = [{}] * len(samples)
    for start in tqdm(range(0, len(order), micro), desc="eval: KL", unit="batch", leave=False):
        batch = order[start : start + micro]
        ids, mask = pad_right(
            [p + r for p, r in (sequences[i] for i in batch)], tokenizer.pad_id, next(policy.parameters()).device
        )
        below = lower(ids, mask) if lower else None
        states = [hidden_states(lm, ids, mask, lower=below) for lm in (policy, reference)]
        for b, i in enumerate(batch):
            prompt, response = sequences[i]
            span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
            found[i] = response_kl(policy, reference, states[0][b, span], states[1][b, span], response, temperature)
    return found


def response_kl(policy, reference, hidden, ref_hidden, tokens: list[int], temperature: float) -> dict[str, float]:
    """Sums over one response from hidden states [T, H] of both models, logits LOGIT_ROWS rows at a time."""
    sums = {"logp": 0.0, "kl_k1": 0.0, "kl_k3": 0.0, "kl_rb": 0.0}
    for start in range(0, len(tokens), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logits = policy.get_output_embeddings()(hidden[rows]).float() / temperature
        ref_logits = reference.get_output_embeddings()(ref_hidden[rows]).float() / temperature
        ids = torch.tensor(tokens[rows], device=hidden.device)[:, None]
        logp, ref = (x.log_softmax(-1).gather(-1, ids).squeeze(-1) for x in (logits, ref_logits))
        sums["logp"] += float(logp.sum())
        sums["kl_k1"] += float(kl_k1(logp, ref).sum())
        sums["kl_k3"] += float(kl_k3(logp, ref).sum())
        sums["kl_rb"] += float(exact_kl(logits, ref_logits).sum())
    return sums


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
