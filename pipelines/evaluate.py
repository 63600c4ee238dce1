"""Stage `eval`: the reference, every PPO checkpoint and their moving average on held-out prompts: proxy, gold and KL.

Samples are drawn at the training temperature, so that rewards and KL speak of the same distribution. Gold is
read here for the first time after the labels. Several processes divide the checkpoints, or shards of the prompts of
each, and then the scoring.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from bon.gains import scale
from bon.pools import Pools
from bon.scores import optimised_rewards, put_together, read_pools, score_gold, score_shards
from core import starting
from core.config import Config, Model
from core.data.chat import ChatTokenizer
from core.data.rows import EvaluationRow, PromptRow, ResponseRow, SampleRow
from core.data.splits import read_split
from core.data.streams import stream_seed
from core.errors import ArtefactError
from core.files import join, open_tensors, read_table, write_table
from core.generation.local import Generator
from core.generation.pool import SampledPool, prompt_shards
from core.models import CausalLM
from core.models.loading import load_causal_lm
from core.parts import write_part
from core.shares import Share, remove_shards, shard_file
from core.training.distributed import device
from core.training.weights import named_weights
from pipelines.policy_kl import measure_kl
from ppo.reward.mixed import PART
from ppo.reward.own import own_rewards
from rm.checkpoints.layout import read_about
from rm.combine import proxy_reward
from rm.gold import with_reading
from rm.model import RewardModel

SCORED_PROMPTS = 16
"""Prompts whose responses, of all checkpoints, are scored together: so a prompt is computed once for all of them."""
IDS = ("step", "prompt_id", "sample_id")
"""Columns that name a response."""
AVERAGE = -1
"""Stands for the step of the moving average of the weights (`ppo.ema`) until its rows have a table of their own."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    """Run the stage on this process; the metrics of the stage on the first one, nothing on the others."""
    share = Share.of_this_process()
    checkpoints = policies_of(inputs["ppo"])
    tables = sample_checkpoints(cfg, inputs["prompts"], checkpoints, out, share)
    share.wait_for(tables, title="eval")
    rows = [row for table in tables for row in read_table(table)]
    shards = by_prompts(rows)
    mine = {number: cast(list[SampleRow], shards[number]) for number in share.of(len(shards))}
    pool = SampledPool(out / "rl_eval.parquet", len(shards), mine, share)
    scores = score_proxies(cfg, inputs["rm"], pool, out / "scores")
    gold_table = out / "scores" / "gold.parquet"
    gold = score_gold(cfg.gold, gold_table, pool, write=_write_scores)
    if gold is None or not share.is_first:
        return {}
    put_together([*scores, gold_table], pool, title="eval")
    rewards = combined_rewards(cfg, inputs["rm"], [_scores(rows, table) for table in scores])
    tokenizer, responses = ChatTokenizer(cfg.policy), cast(list[ResponseRow], rows)
    columns = {"proxy": rewards, "gold": _scores(rows, gold_table)}
    columns |= {f"{PART}{k}": of.score(responses).tolist() for k, of in own_rewards(cfg.ppo.reward, tokenizer).items()}
    drop = ("split", "token_ids", "tokenizer", "metadata")
    table = [
        {
            "run": cfg.run.name,
            **{k: v for k, v in row.items() if k not in drop},
            **{name: values[i] for name, values in columns.items()},
        }
        for i, row in enumerate(rows)
    ]
    steps = [row for row in table if row["step"] != AVERAGE]
    averages = [row | {"step": max(checkpoints)} for row in table if row["step"] == AVERAGE]
    write_table(pool.table, steps, EvaluationRow)
    shutil.rmtree(out / "scores")  # they are columns of the table now
    pools = read_pools(inputs["bon"], cfg.ppo.members)
    optimised = optimised_rewards(inputs["rm"], pools, cfg.ppo.members, cfg.ppo.combine)
    metrics = summary(steps, pools, optimised)
    if averages:
        write_table(out / "rl_eval_average.parquet", averages, EvaluationRow)
        of_average = summary([row for row in steps if row["step"] == 0] + averages, pools, optimised)
        metrics |= with_average(metrics, of_average)
    return with_reading(metrics, gold, tokenizer, responses)


def policies_of(folder: Path) -> dict[int, Path | None]:
    """The folders of a run's policies by their step: of the reference none, and AVERAGE for their moving average."""
    checkpoints = sorted((folder / "checkpoints").iterdir())
    steps: dict[int, Path | None] = {0: None} | {int(path.name.split("-")[1]): path for path in checkpoints}
    average = folder / "policy-ema"
    return steps | ({AVERAGE: average} if average.is_dir() else {})


def with_average(metrics: dict, average: dict) -> dict:
    """What the moving average adds to the metrics, from its `summary` against the reference."""
    text = average["headline"].partition(", in SD within prompts: ")[2]
    return {
        "headline": f"{metrics['headline']}; policy-ema: {text}",
        "average": {**average["table"][-1], **{k: v for k, v in average.items() if k.endswith("_change")}},
    }


def by_prompts(rows: list[dict]) -> list[list[dict]]:
    """The rows of SCORED_PROMPTS prompts each, in the order in which the prompts come first."""
    of_prompt: dict[str, list[dict]] = {}
    for row in rows:
        of_prompt.setdefault(row["prompt_id"], []).append(row)
    groups = list(of_prompt.values())
    return [
        [row for group in groups[start : start + SCORED_PROMPTS] for row in group]
        for start in range(0, len(groups), SCORED_PROMPTS)
    ]


def score_proxies(cfg: Config, reward_models: Path, pool: SampledPool, out: Path) -> list[Path]:
    """Score this process's shards by the reward models that PPO optimised, as the pools are scored; their tables."""
    tables = {name: out / f"{name}.parquet" for name in cfg.ppo.members}
    for name, table in tables.items():
        if pool.share.missing(table, pool.count):
            model = RewardModel.from_pretrained(reward_models / name, attention=cfg.policy.attention, lm_head=False)
            score = lambda shard, bar: model.score_rows(shard, progress=bar).tolist()  # noqa: B023, E731
            score_shards(table, pool, score, title=f"eval: {name}", write=_write_scores)
    return list(tables.values())


def _write_scores(path: Path, rows: Sequence[Mapping[str, Any]], scores: list[float]) -> None:
    ids = [{column: row[column] for column in IDS} for row in rows]
    write_table(path, [{**row, "score": score} for row, score in zip(ids, scores, strict=True)])


def _scores(rows: list[dict], table: Path) -> list[float]:
    return [row["score"] for row in join([{c: row[c] for c in IDS} for row in rows], read_table(table), IDS)]


def combined_rewards(cfg: Config, reward_models: Path, raw: list[list[float]]) -> list[float]:
    """One reward from those of each member, raw, as PPO combined them."""
    about = [read_about(reward_models / name) for name in cfg.ppo.members]
    units = [(a["mean"], a["std"]) for a in about]
    return proxy_reward(torch.tensor(raw, dtype=torch.float32), units, cfg.ppo.combine).tolist()


def sample_checkpoints(
    cfg: Config, prompts: Path, checkpoints: dict[int, Path | None], out: Path, share: Share
) -> list[Path]:
    """A table for each checkpoint under `steps/`, with KL: of the reference first.

    Each is made of shards of prompts, which the processes divide and a killed stage keeps. Returns the tables, all of
    which are there once the first process has returned.
    """
    tokenizer = ChatTokenizer(cfg.policy)
    rows = read_split(prompts, "eval", cfg.eval.prompts)
    parts = prompt_shards(rows, cfg.eval.shard_prompts or len(rows))
    share.advise("eval.shard_prompts", len(rows), len(parts), tables=len(checkpoints))
    named = {step: "average" if step == AVERAGE else f"{step:04d}" for step in checkpoints}
    tables = {step: out / "steps" / f"{name}.parquet" for step, name in named.items()}
    numbered = [(step, part) for step in checkpoints for part in range(len(parts))]
    missing = [
        (step, part) for step, part in (numbered[number] for number in share.of(len(numbered)))
        if not tables[step].exists() and not shard_file(tables[step], part).exists()
    ]  # fmt: skip
    if missing:
        generator = Generator(cfg.policy, cfg.generation, tokenizer)
        reference = _load(cfg, cfg.policy).eval().to(device())
        starting.working()
        with share.bar(total=len(missing), desc="eval: checkpoints", unit="shard") as bar:
            for step, of_step in groupby(missing, key=itemgetter(0)):
                folder = checkpoints[step]
                policy = load_policy(cfg, folder) if folder else reference
                if folder:
                    generator.sync(named_weights(policy))
                for _, part in of_step:
                    samples = _samples(cfg, generator, parts[part], step, part)
                    kls = measure_kl(
                        policy, reference, tokenizer, samples, cfg.generation.temperature, cfg.eval.micro_batch,
                        quiet=not share.is_first,
                    )  # fmt: skip
                    file = shard_file(tables[step], part)
                    measured = [{**s, **kl} for s, kl in zip(samples, kls, strict=True)]
                    write_part(file, partial(write_table, rows=measured))
                    bar.update()
        generator.close()
    for step, table in tables.items():
        share.make_whole(table, len(parts), title=f"eval: step {named[step]}")
    if share.is_first:
        remove_shards(tables.values())  # the other processes read the tables
    return list(tables.values())


def _samples(cfg: Config, generator: Generator, rows: Sequence[PromptRow], step: int, part: int) -> list[dict]:
    """Responses of the weights that vLLM has, those of a step; `part` is the number of the shard of prompts."""
    tokenizer = generator.tokenizer
    ids = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    names = (step,) if cfg.eval.shard_prompts is None else (step, part)
    groups = generator.generate(ids, n=cfg.eval.samples, seed=stream_seed(cfg.run.seed, "eval", *names))
    return [
        {
            "step": step, "prompt_id": row["prompt_id"], "sample_id": k, "split": row["split"],
            "prompt": row["prompt"], "response": c.text, "token_ids": c.token_ids,
            "n_tokens": len(c.token_ids), "finished": c.finished, "logp_sampler": float(sum(c.logprobs)),
            "tokenizer": tokenizer.fingerprint,
            **({"metadata": row["metadata"]} if "metadata" in row else {}),
        }
        for row, group in zip(rows, groups, strict=True)
        for k, c in enumerate(group)
    ]  # fmt: skip


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
    """The last checkpoint against the reference, in the unit of the report, and KL, length, ends and own rewards of
    each.

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
            **{name: float(of_prompts(step, name).mean()) for name in rows[0] if name.startswith(PART)},
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
