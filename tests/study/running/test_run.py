"""A whole study on the first layers of the model: reward models, pools, PPO, report. Also one that is killed."""

import json
import shutil
import signal
import subprocess

import pytest

from tests.builders.processes import GRM, ROOT, background, wait_for

TINY = [
    "--config", "configs/smoke.yaml", "study.variants=[bt, grm]", "study.seeds=2", "study.pairs=[32]",
    "study.layers=[3]", "study.label_noise=[0.25]", "study.ppo_variants=[bt]", "study.kl_coefs=[0.0]", "ppo.steps=2",
    "ppo.minibatches=1", "ppo.ensemble=null", "study.ppo_ensembles=[min]", "bon.shard_prompts=4",
]  # fmt: skip


def command(policy, runs):
    models = [f"policy.path={policy}", f"rm.base.path={policy}"]
    return [*GRM, "study", *TINY, *models, f"run.dir={runs}"]


def finish(policy, runs) -> str:
    done = subprocess.run(command(policy, runs), cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


@pytest.fixture(scope="module")
def whole(small_policy, tmp_path_factory):
    """The run of a finished study."""
    runs = tmp_path_factory.mktemp("study")
    finish(small_policy, runs)
    return runs / "smoke"


@pytest.mark.long
@pytest.mark.e2e
def test_a_study_from_prompts_to_its_page(small_policy, whole):
    out = whole / "study"
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
    assert checks["training never reads gold"] and checks["label noise is what was configured"]
    policies = json.loads((out / "policies.json").read_text())
    assert {f["condition"] for f in policies.values()} == {f"bt-{base}", f"bt-{base} x 2, min"}
    assert finish(small_policy, whole.parent).count("up to date") == 4 + 2 * len(policies)


@pytest.mark.long
@pytest.mark.e2e
def test_a_killed_study_resumes_to_the_uninterrupted_curves(small_policy, whole, tmp_path):
    """Killed once two of its four reward models are trained."""
    for stage in ("prompts", "preferences"):  # what comes before the kill is the same
        shutil.copytree(whole / stage, tmp_path / "smoke" / stage)
    rm, log = tmp_path / "smoke" / "rm.partial", tmp_path / "log"
    with background(*command(small_policy, tmp_path), log=log) as killed:
        wait_for(lambda: len(list(rm.glob("*/metrics.json"))) >= 2, killed, seconds=600)
    assert rm.is_dir() and not (tmp_path / "smoke" / "rm").exists()
    kept = {p.parent.name: p.stat().st_mtime_ns for p in rm.glob("*/metrics.json")}
    finish(small_policy, tmp_path)
    assert all((tmp_path / "smoke" / "rm" / n / "metrics.json").stat().st_mtime_ns == t for n, t in kept.items())
    found, expected = ((run / "study" / "curves.csv").read_text() for run in (tmp_path / "smoke", whole))
    assert found == expected


@pytest.mark.long
@pytest.mark.e2e
def test_policies_at_once_are_stopped_and_continued(small_policy, whole, tmp_path):
    """SIGTERM to the study reaches both policies, each of which has saved its step; then both end."""
    for stage in ("prompts", "preferences", "rm", "bon"):
        shutil.copytree(whole / stage, tmp_path / "smoke" / stage)
    study = [*command(small_policy, tmp_path), "study.policies_at_once=2"]
    log, policies = tmp_path / "log", tmp_path / "smoke" / "policies"
    with background(*study, log=log) as stopped:
        wait_for(lambda: len(list(policies.glob("*/ppo.partial/metrics.jsonl"))) == 2, stopped, seconds=600)
        stopped.terminate()
        assert stopped.wait(timeout=300) == 128 + signal.SIGTERM
    assert log.read_text().count("ppo stopped") == 2
    outputs = [file.read_text() for file in policies.glob("*/output.txt")]
    assert len(outputs) == 2 and all("the same command continues from there" in text for text in outputs)
    done = subprocess.run(study, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr.count("ppo took") == done.stderr.count("eval took") == 2
    found = json.loads((tmp_path / "smoke" / "study" / "policies.json").read_text())
    assert found.keys() == json.loads((whole / "study" / "policies.json").read_text()).keys()
