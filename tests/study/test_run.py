"""A whole study, reward models, pools, PPO, report, on the first layers of the model: killed, it ends as unbroken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.builders.processes import ROOT

TINY = [
    "--config", "configs/smoke.yaml", "study.methods=[bt, grm]", "study.seeds=2", "study.pairs=[32]",
    "study.layers=[3]", "study.label_noise=[0.25]", "study.ppo_methods=[bt]", "study.kl_coefs=[0.0]", "ppo.steps=2",
    "ppo.minibatches=1", "ppo.ensemble=null", "bon.shard_prompts=4",
]  # fmt: skip


def command(policy, runs):
    models = [f"policy.path={policy}", f"rm.base.path={policy}"]
    return [sys.executable, "-m", "pipelines", "study", *TINY, *models, f"run.dir={runs}"]


def finish(policy, runs) -> str:
    done = subprocess.run(command(policy, runs), cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


@pytest.mark.e2e
def test_a_killed_study_ends_with_the_curves_of_an_unbroken_one(small_policy, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(small_policy, whole)
    out = whole / "smoke" / "study"
    assert {"study.html", "curves.csv", "conditions.json", "policies.json", "checks.json", "kl.csv", "rms.csv"} <= {
        p.name for p in out.iterdir()
    }
    conditions = json.loads((out / "conditions.json").read_text())
    base = "32pairs-3layers-noise0.25"
    assert set(conditions) >= {f"bt-{base}", f"grm-{base}", f"grm-{base} x 2, mean"}
    rms = {r["rm"]: r for r in json.loads((out / "rms.json").read_text())}
    one = rms[f"grm-{base}-seed1"]
    assert (one["layers"], one["pairs"], one["label_noise_realised"]) == (3, 32, 0.25) and one["params"] < 6e7
    assert 0 <= one["accuracy"]["mean"] <= 1 and one["val_loss_nats"] > 0
    checks = {c["name"]: c["ok"] for c in json.loads((out / "checks.json").read_text())}
    assert checks["training never reads gold"] and checks["label noise is what was asked"]
    assert finish(small_policy, whole).count("up to date") == 4 + 2

    for stage in ("prompts", "preferences"):  # what comes before the kill is the same
        shutil.copytree(whole / "smoke" / stage, broken / "smoke" / stage)
    rm = broken / "smoke" / "rm.partial"
    with (tmp_path / "log").open("w") as log:
        job = command(small_policy, broken)
        killed = subprocess.Popen(job, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.time() + 600
            while len(list(rm.glob("*/metrics.json"))) < 2 and killed.poll() is None and time.time() < deadline:
                time.sleep(0.1)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
    assert rm.is_dir() and not (broken / "smoke" / "rm").exists(), (tmp_path / "log").read_text()[-3000:]
    time.sleep(2)  # the ranks are in groups of their own where torchrun put them there
    subprocess.run(["pkill", "-9", "-f", str(broken)], check=False)
    kept = {p.parent.name: p.stat().st_mtime_ns for p in rm.glob("*/metrics.json")}
    finish(small_policy, broken)
    assert all((broken / "smoke" / "rm" / n / "metrics.json").stat().st_mtime_ns == t for n, t in kept.items())
    found, expected = ((d / "smoke" / "study" / "curves.csv").read_text() for d in (broken, whole))
    assert found == expected
