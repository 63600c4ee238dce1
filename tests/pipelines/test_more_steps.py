"""A new run that takes its inputs from a finished one, and a PPO run to which a step is added. Five to nine minutes."""

import json
import os
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from core.artefacts import manifest_digest, read_manifest
from tests.builders.processes import GRM, ROOT


def rows(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.mark.long
@pytest.mark.e2e
def test_a_run_that_is_continued_gives_the_result_of_a_longer_one(run_dir):
    """Two steps and then a third are the three of `run_dir`, to the last bit."""
    new = run_dir.with_name("short")

    def ppo(*arguments):
        command = [*GRM, "ppo", "-c", "configs/smoke.yaml", f"run.dir={run_dir.parent}",
                   "run.name=short", *arguments]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                              text=True, timeout=1200)  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stderr

    before = {stage: sorted(p.stat().st_mtime_ns for p in (run_dir / stage).rglob("*")) for stage in ("rm", "prompts")}
    said = ppo("--from", str(run_dir), "ppo.steps=2")
    assert all(f"{stage}: linked" in said for stage in ("prompts", "preferences", "rm"))
    assert "ppo: will run, because ppo.steps: 3 -> 2" in said
    assert all((new / stage).is_symlink() for stage in ("prompts", "preferences", "rm"))
    assert rows(new / "ppo") == rows(run_dir / "ppo")[:2]
    two_steps = manifest_digest(read_manifest(new / "ppo"))

    said = ppo("ppo.steps=3")
    assert "ppo.steps 2 -> 3 continues" in said
    assert rows(new / "ppo") == rows(run_dir / "ppo")
    for file in ("policy/model.safetensors", "checkpoints/step-0003/adapter_model.safetensors"):
        whole, continued = (load_file(folder / "ppo" / file) for folder in (run_dir, new))
        assert whole.keys() == continued.keys() and all(torch.equal(whole[k], continued[k]) for k in whole)

    started = time.monotonic()
    assert "up to date again" in ppo("ppo.steps=2") and time.monotonic() - started < 60  # no step is run
    assert manifest_digest(read_manifest(new / "ppo")) == two_steps and len(rows(new / "ppo")) == 2
    after = {stage: sorted(p.stat().st_mtime_ns for p in (run_dir / stage).rglob("*")) for stage in before}
    assert after == before
