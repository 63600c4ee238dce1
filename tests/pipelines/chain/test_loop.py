"""Iterated RLHF: which policy each round begins with, and that rounds are runs."""

import subprocess

import pytest
import torch
import yaml
from safetensors.torch import load_file

from core.artefacts import read_manifest
from core.config.load import load
from core.errors import ConfigError
from pipelines import loop
from pipelines.__main__ import main
from pipelines.loop import rounds
from tests.builders.inputs.tiny_run import tiny_run
from tests.builders.processes import GRM, ROOT


def test_each_round_begins_with_the_policy_of_the_one_before(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({
        "run": {"name": "a", "dir": str(tmp_path)}, "policy": {"path": "owner/base", "revision": "abc"},
        "sft": {"data": "owner/demonstrations"}, "rm": {"base": {"path": "owner/other"}},
    }))  # fmt: skip
    first, second, third = (one.cfg for one in rounds([str(config)], ["ppo.steps=5"], 3))
    assert [cfg.run_dir for cfg in (first, second, third)] == [tmp_path / "a" / f"round-{k}" for k in (1, 2, 3)]
    assert (first.policy.path, first.policy.revision) == ("owner/base", "abc") and first.sft
    assert first.after_sft().policy.path == str(tmp_path / "a" / "round-1" / "sft" / "policy")
    assert second.policy.path == str(tmp_path / "a" / "round-1" / "ppo" / "policy")
    assert third.policy.path == str(tmp_path / "a" / "round-2" / "ppo" / "policy")
    for cfg in (second, third):
        assert cfg.sft is None and cfg.policy.revision is None and cfg.after_sft() is cfg
        assert cfg.rm.base.path == "owner/other" and cfg.ppo.steps == 5


def test_stages_run_in_order_and_a_failure_ends_the_loop(tmp_path, monkeypatch):
    asked = []

    def bring(name, cfg, arguments):
        asked.append((cfg.run.name, name, arguments))
        return 3 if (cfg.run.name, name) == ("offline/round-2", "rm") else 0

    monkeypatch.setattr(loop.launch, "bring_up_to_date", bring)
    assert main(["loop", "--rounds", "3", f"run.dir={tmp_path}"]) == 3
    assert [(run[-1], name) for run, name, _ in asked] == [
        *(("1", name) for name in ("prompts", "preferences", "rm", "ppo")),
        *(("2", name) for name in ("prompts", "preferences", "rm")),
    ]
    # A process of the stage reads the same configuration from its arguments.
    name, *words = asked[-1][2]
    assert name == "rm" and words[:2] == ["--config", "configs/offline.yaml"]
    assert load(["configs/offline.yaml"], words[2:]).policy.path == f"{tmp_path}/offline/round-1/ppo/policy"


def test_rounds_are_counted_from_one():
    with pytest.raises(ConfigError, match="--rounds 0: there must be at least one"):
        loop.main(["--rounds", "0"])


@pytest.mark.long
def test_two_rounds_of_a_tiny_policy(tokenizer_path, tmp_path):
    config = tiny_run(tokenizer_path, tmp_path, steps=1, checkpoint_every=1)
    small = ["preferences={max_train_pairs: 16, max_val_pairs: 8, max_calibration_prompts: 4}", "rm.global_batch=8",
             "rm.micro_batch=4", "rm.max_tokens=192"]  # fmt: skip
    command = [*GRM, "loop", "--rounds", "2", "--config", str(config), *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (tmp_path / "tiny" / f"round-{k}" for k in (1, 2))
    inputs = read_manifest(second / "preferences")["inputs"]
    assert f"policy.path={first / 'ppo' / 'policy'}" in inputs
    before, after = (load_file(run / "ppo" / "policy" / "model.safetensors") for run in (first, second))
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.stderr.count("up to date") == 8, again.stderr
