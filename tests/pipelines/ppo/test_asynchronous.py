"""PPO whose vLLM server is up to two steps ahead: stopped, killed and resumed."""

import json
import shutil
import subprocess

import pytest

from core.data.rows import RolloutRow
from core.files import read_rows, read_table
from core.ranks import free_port
from core.stopping import EXIT_STOPPED
from ppo.measured.rollouts import tables
from tests.builders.processes import GRM, ROOT, answers, background, wait_for

STEPS = 6


@pytest.mark.long
@pytest.mark.e2e
def test_a_server_two_steps_ahead_is_never_further_and_a_resumed_run_goes_on(run_dir, tmp_path):
    for stage in ("prompts", "preferences", "rm"):
        shutil.copytree(run_dir / stage, tmp_path / "smoke" / stage)
    port, log, partial = free_port(), tmp_path / "log", tmp_path / "smoke" / "ppo.partial"
    url, metrics = f"http://127.0.0.1:{port}", partial / "metrics.jsonl"
    job = [*GRM, "ppo", "-c", "configs/smoke.yaml", f"run.dir={tmp_path}", f"ppo.steps={STEPS}", "ppo.save_every=1",
           f"ppo.vllm_servers=[{url}]", "ppo.overlap=2", "ppo.clip.importance_weight=5",
           "ppo.clip.importance_mask={level: token, low: 0.5, high: 5}"]  # fmt: skip

    def steps() -> int:
        return len(read_rows(metrics)) if metrics.is_file() else 0

    with background(*GRM, "vllm-serve", "-c", "configs/smoke.yaml", "--port", port, log=log) as server:
        wait_for(lambda: answers(f"{url}/v1/models"), server)
        with background(*job, log=tmp_path / "stopped") as stopped:
            wait_for(lambda: steps() >= 2, stopped)
            stopped.terminate()
            assert stopped.wait(300) == EXIT_STOPPED, (tmp_path / "stopped").read_text()[-4000:]
        first = json.loads((partial / "state" / "last.json").read_text())["step"]
        with background(*job, log=tmp_path / "killed") as killed:
            wait_for(lambda: steps() > first, killed)
            killed.kill()
        second = json.loads((partial / "state" / "last.json").read_text())["step"]
        done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    rows = read_rows(tmp_path / "smoke" / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    fresh = {1, first + 1, second + 1}  # the first steps of the three processes
    for row in rows:
        assert 0 <= row["staleness_mean"] <= row["staleness_max"] <= 2, row
        assert (row["staleness_max"] == 0) == (row["step"] in fresh), row
        assert 0 <= row["is_masked_share"] < 1 and 0.5 < row["is_weight_mean"] < 2
    rollouts = tables(tmp_path / "smoke" / "ppo" / "rollouts")
    assert list(rollouts) == list(range(1, STEPS + 1))
    for row, table in zip(rows, rollouts.values(), strict=True):
        ages = [row["step"] - 1 - sample["policy"] for sample in read_table(table, RolloutRow)]
        assert max(ages) == row["staleness_max"] and sum(ages) / len(ages) == pytest.approx(row["staleness_mean"])
