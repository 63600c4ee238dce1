"""Families of language models through the real stages, with vLLM and DeepSpeed: `make test-models`.

With RLHF_MODELS_TABLE=FILE the seconds of each family and stage are written there as a table.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from core.files import read_rows, read_table
from tests.builders.policies import FAMILIES, tiny_policy
from tests.builders.processes import GRM, ROOT

STAGES = ("prompts", "preferences", "rm", "bon", "ppo", "eval")
TABLE = os.environ.get("RLHF_MODELS_TABLE")
SAMPLED = {"gemma3": "llama"} if find_spec("torchvision") is None else {}
"""Families that vLLM cannot run here, since it needs torchvision for them: reward models and critics on a policy of the
other family, which has the same tokenizer."""
HEADING = (
    "# Families of language models",
    "",
    "A tiny model of each family, with random weights, goes through the real stages with vLLM and DeepSpeed on CPU:",
    "two reward models (GRM with adapters, Bradley-Terry with trained top layers), best-of-n, one step of PPO, and",
    "eval. The log-probs of vLLM and of the trainer agree, before the step and with the weights after it. Written by",
    f"`make test-models` on {os.cpu_count()} cores, in float32; the numbers are seconds.",
    "",
)


def settings(policy: Path, base: Path, run: Path, prompts: Path) -> dict:
    """As small as the stages allow: two reward models (adapters, and top layers), and one step of PPO."""
    model = {"path": str(policy)}
    lora = {"rank": 4, "alpha": 8, "top_layers": 1}
    return {
        "run": {"name": "tiny", "dir": str(run)},
        "policy": model,
        "data": {"prompts": str(prompts), "max_prompt_tokens": 160},
        "generation": {"max_new_tokens": 8, "vllm": {"max_model_len": 192, "max_num_seqs": 16, "dtype": "float32"}},
        "preferences": {"max_train_pairs": 16, "max_val_pairs": 8, "max_calibration_prompts": 4},
        "rm": {
            "base": {"path": str(base)}, "lora": lora, "global_batch": 8, "micro_batch": 4, "max_tokens": 192,
            "optim": {"lr": 1e-3},
            "variants": {"grm": {"text_regulariser": "sft", "alpha": 0.1}, "bt": {"trainable_layers": 1}},
        },
        "bon": {"samples": 4, "prompts": 4},
        "ppo": {
            "proxy": "grm", "lora": lora, "steps": 1, "rollouts": 8, "micro_batch": 4, "minibatches": 1,
            "critic_trainable_layers": 1, "checkpoint_every": 1, "save_every": 1, "actor": {"lr": 1e-3},
        },
        "engine": {"processes": 1, "dtype": "float32"},  # so that log-probs must agree beyond rounding on any machine
        "eval": {"prompts": 4, "bootstrap": 100},
    }  # fmt: skip


def run_stage(stage: str, config: Path) -> float:
    """Seconds of `grm STAGE`; a failed test with the end of its output."""
    started = time.monotonic()
    done = subprocess.run([*GRM, stage, "--config", config], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{stage}\n{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
    return time.monotonic() - started


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_all_stages(family, tokenizer_path, tmp_path):
    base = tiny_policy(family, tokenizer_path, tmp_path / "base")
    policy = tiny_policy(SAMPLED.get(family, family), tokenizer_path, tmp_path / "policy")
    prompts = tmp_path / "prompts.jsonl"
    lines = (ROOT / "data" / "prompts.jsonl").read_text().splitlines()
    prompts.write_text("\n".join(sorted(lines, key=len)[:200]))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(policy, base, tmp_path, prompts)))
    seconds = {stage: run_stage(stage, config) for stage in STAGES}

    run = tmp_path / "tiny"
    for name in ("grm", "bt"):
        assert (run / "rm" / name / "reward_model.json").is_file()
        steps = read_rows(run / "rm" / name / "train.jsonl")
        assert all(math.isfinite(row["loss"]) for row in steps) and len(steps) == 2
        scores = [row["score"] for row in read_table(run / "bon" / "scores" / f"{name}.parquet")]
        assert len(scores) == 16 and len(set(scores)) > 1
    (step,) = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert step["mismatch_mean_abs"] < 1e-3, step  # vLLM's log-probs against the trainer's
    assert step["kl_nats_per_response"] == 0.0
    rows = read_table(run / "eval" / "rl_eval.parquet")
    for row in rows:
        # What vLLM sampled from is what KL is measured of: before the step, and with the weights after it.
        assert row["logp"] == pytest.approx(row["logp_sampler"], abs=2e-2)
    after = [row["kl_rb"] for row in rows if row["step"] == 1]
    assert all(row["kl_rb"] == pytest.approx(0, abs=1e-4) for row in rows if row["step"] == 0)
    assert sum(after) > 0
    if TABLE:
        sampled = f" (policy: {SAMPLED[family]})" if family in SAMPLED else ""
        add_to_table(Path(TABLE), family + sampled, seconds)


def add_to_table(file: Path, family: str, seconds: dict[str, float]) -> None:
    """Add or replace a row, so that families can be run one by one."""
    kept = file.read_text().splitlines() if file.is_file() else []
    rows = {line.split(" | ")[0]: line for line in kept if line.startswith("| ") and line[-3].isdigit()}
    row = f"| {family} | " + " | ".join(f"{seconds[stage]:.0f}" for stage in STAGES) + " |"
    rows[row.split(" | ")[0]] = row
    head = [*HEADING, "| family | " + " | ".join(STAGES) + " |", "| --- |" + " ---: |" * len(STAGES)]
    file.write_text("\n".join([*head, *(rows[name] for name in sorted(rows))]) + "\n")
