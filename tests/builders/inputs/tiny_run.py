"""A run of a tiny policy whose stages before `ppo` are finished, and what `grm ppo` makes of it in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from core.artefacts import partial_of, publish
from core.config import Config, Model
from core.config.load import load
from core.data.chat import ChatTokenizer
from core.files import read_rows
from core.models.loading import load_causal_lm
from pipelines import stages
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from tests.builders.policies import tiny_policy
from tests.builders.processes import ROOT


def tiny_run(
    tokenizer: Path, folder: Path, *, new_tokens: int = 8, overrides: dict | None = None, **ppo: object
) -> Path:
    """The configuration file of a run in `folder`, with responses of at most `new_tokens`.

    Args:
        overrides: of vLLM's arguments.
        ppo: options besides those here.
    """
    policy, config = tiny_policy("llama", tokenizer, folder / "policy"), folder / "config.yaml"
    lines = (ROOT / "data" / "prompts.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join(sorted(lines, key=len)[:200]))
    vllm = {"max_model_len": 184 + new_tokens, "max_num_seqs": 16, "dtype": "float32", "cpu_kvcache_gib": 1,
            "overrides": overrides or {}}  # fmt: skip
    model = {"path": str(policy), "attention": "eager"}
    config.write_text(yaml.safe_dump({
        "run": {"name": "tiny", "dir": str(folder)}, "policy": model, "rm": {"base": model, "variants": {"bt": {}}},
        "data": {"prompts": str(folder / "prompts.jsonl"), "max_prompt_tokens": 160},
        "generation": {"max_new_tokens": new_tokens, "vllm": vllm},
        "ppo": {
            "proxy": "bt", "lora": {"rank": 4, "alpha": 8}, "steps": 8, "rollouts": 4, "micro_batch": 1,
            "minibatches": 2, "critic_trainable_layers": 1, "checkpoint_every": 4, "save_every": 1,
            "actor": {"lr": 1e-3}, **ppo,
        },
        "engine": {"processes": 2, "dtype": "float32", "rank_timeout": 40},
    }))  # fmt: skip
    cfg = load([config], [])
    stages.run("prompts", cfg)
    finish(cfg, "preferences", lambda out: (out / "pairs.txt").write_text("none: nothing here reads them"))
    finish(cfg, "rm", lambda out: untrained(cfg.policy, out / "bt"))
    return config


def finish(cfg: Config, stage: str, write) -> None:
    """Publish what `write(folder)` makes as the result of a stage."""
    folder = cfg.run_dir / stage
    out = partial_of(folder)
    out.mkdir()
    write(out)
    wanted = stages.fingerprint(stages.STAGES[stage], cfg)
    publish(out, folder, stage, wanted, seed=1, seconds=0.0, metrics={"headline": "made by a test"})


def untrained(policy: Model, folder: Path) -> None:
    """A reward model on the layers of the policy."""
    torch.manual_seed(1)
    model = RewardModel(load_causal_lm(policy, dtype="float32"), "mlp", ChatTokenizer(policy), std=0.1)
    save_reward_model(folder, model, model.lm.named_parameters(), model.head.state_dict())


def copy_of(whole: Path, folder: Path) -> Path:
    """The configuration of the run in `whole`, as it was before its stage `ppo`, in another folder."""
    for stage in ("prompts", "preferences", "rm"):
        shutil.copytree(whole / "tiny" / stage, folder / "tiny" / stage)
    config = folder / "config.yaml"
    config.write_text((whole / "config.yaml").read_text().replace(f"dir: {whole}\n", f"dir: {folder}\n"))
    return config


def result(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics without seconds, and the last policy's weights."""
    rows = read_rows(run / "ppo" / "metrics.jsonl")
    untimed = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return untimed, load_file(run / "ppo" / "policy" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two runs came to the same metrics and weights, bit for bit."""
    (rows, weights), (others, found) = result(one), result(other)
    return rows == others and weights.keys() == found.keys() and all(found[k].equal(w) for k, w in weights.items())
