"""PPO that is stopped, killed or started with another number of ranks."""

import json
import shutil
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from core.artefacts import open_partial
from core.config.load import load
from core.files import read_rows
from core.stopping import EXIT_STOPPED
from pipelines import stages
from tests.builders.processes import GRM, ROOT, background, draw, wait_for


def ppo_job(run_dir, runs) -> list[str]:
    """The stage `ppo` of configs/smoke.yaml in another folder, after the finished stages that it reads."""
    for stage in ("prompts", "preferences", "rm"):
        shutil.copytree(run_dir / stage, runs / "smoke" / stage)
    return [*GRM, "ppo", "-c", "configs/smoke.yaml", f"run.dir={runs}"]


def untimed_metrics(run) -> list[dict]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in read_rows(run / "ppo" / "metrics.jsonl")]


def steps_logged(metrics) -> int:
    """0 where there is no such file, or no longer, since the stage has published its folder."""
    try:
        return metrics.read_text().count("\n")
    except FileNotFoundError:
        return 0


@pytest.mark.e2e
def test_a_stopped_and_killed_ppo_resumes_to_the_uninterrupted_result(run_dir, tmp_path):
    """SIGTERM after the first step, SIGKILL at a random moment after the next one, then left alone."""
    job, log, partial = ppo_job(run_dir, tmp_path), tmp_path / "log", tmp_path / "smoke" / "ppo.partial"
    with background(*job, log=log) as stopped:
        metrics = partial / "metrics.jsonl"
        wait_for(lambda: steps_logged(metrics), stopped)
        stopped.terminate()
        assert stopped.wait(200) == EXIT_STOPPED
    state = json.loads((partial / "state" / "last.json").read_text())
    assert state["step"] in (1, 2) and state["ranks"] == 2
    assert "ppo: stopped after step" in log.read_text()
    rows = len(read_rows(metrics))
    with background(*job, log=log) as killed:
        wait_for(lambda: steps_logged(metrics) > rows or (tmp_path / "smoke" / "ppo").exists(), killed)
        time.sleep(draw("seconds before PPO is killed", 0, 5))
    resumed = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert untimed_metrics(tmp_path / "smoke") == untimed_metrics(run_dir)
    uninterrupted, found = (
        load_file(run / "ppo" / "policy" / "model.safetensors") for run in (run_dir, tmp_path / "smoke")
    )
    assert uninterrupted.keys() == found.keys()
    assert all(torch.equal(uninterrupted[name], weight) for name, weight in found.items())


@pytest.mark.e2e
def test_another_number_of_ranks_is_refused_by_name(run_dir, tmp_path):
    job = ppo_job(run_dir, tmp_path)
    state = tmp_path / "smoke" / "ppo.partial" / "state" / "last.json"
    cfg = load([ROOT / "configs" / "smoke.yaml"], [f"run.dir={tmp_path}"])
    open_partial(cfg.run_dir / "ppo", stages.fingerprint(stages.STAGES["ppo"], cfg))
    state.parent.mkdir()
    state.write_text(json.dumps({"step": 2, "ranks": 8, "kl": {"coef": 0.1}, "scale": {}}))
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "was written by 8 ranks and there are 2 now" in done.stderr, done.stderr[-3000:]
