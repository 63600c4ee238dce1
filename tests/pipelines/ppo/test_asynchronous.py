"""PPO whose vLLM server is several steps ahead: stopped, killed and resumed."""

import json
import subprocess

import pytest

from core.data.rows import RolloutRow
from core.files import read_rows, read_table
from core.ranks import free_port
from core.stopping import EXIT_STOPPED
from ppo.measured.rollouts import tables
from tests.builders.inputs.tiny_run import tiny_run
from tests.builders.processes import GRM, ROOT, answers, background, wait_for

STEPS, AHEAD = 16, 2


@pytest.mark.long
def test_a_server_is_never_too_far_ahead_and_a_resumed_run_goes_on(tokenizer_path, tmp_path):
    """SIGTERM after two steps, SIGKILL after one more, then left alone."""
    config, port = tiny_run(tokenizer_path, tmp_path), free_port()
    url, out = f"http://127.0.0.1:{port}", tmp_path / "tiny" / "ppo"
    partial = out.with_name("ppo.partial")
    job = [*GRM, "ppo", "-c", str(config), f"ppo.steps={STEPS}", f"ppo.vllm_servers=[{url}]", f"ppo.overlap={AHEAD}",
           "ppo.clip.importance_weight=5", "ppo.clip.importance_mask={level: token, low: 0.5, high: 5}"]  # fmt: skip

    def steps() -> int:
        metrics = partial / "metrics.jsonl"
        return len(read_rows(metrics)) if metrics.is_file() else 0

    def state() -> int:
        return json.loads((partial / "state" / "last.json").read_text())["step"]

    with background(*GRM, "vllm-serve", "-c", config, "--port", port, log=tmp_path / "server") as server:
        wait_for(lambda: answers(f"{url}/v1/models"), server)
        with background(*job, log=tmp_path / "stopped") as stopped:
            wait_for(lambda: steps() >= 2, stopped)
            stopped.terminate()
            assert stopped.wait(300) == EXIT_STOPPED
        first = state()
        with background(*job, log=tmp_path / "killed") as killed:
            wait_for(lambda: steps() > first, killed)
            killed.kill()
        second = state()
        done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    fresh = {1, first + 1, second + 1}  # the first steps of the three processes, which had nothing in flight
    rollouts = tables(out / "rollouts")
    assert list(rollouts) == list(range(1, STEPS + 1))
    for row, table in zip(rows, rollouts.values(), strict=True):
        ages = [sample["step"] - 1 - sample["policy"] for sample in read_table(table, RolloutRow)]
        assert (0 == min(ages) == max(ages)) if row["step"] in fresh else (min(ages) >= 1 and max(ages) <= AHEAD)
        assert row["staleness_max"] == max(ages) and row["staleness_mean"] == pytest.approx(sum(ages) / len(ages))
        assert 0 <= row["is_masked_share"] < 0.5 and row["is_weight_mean"] == pytest.approx(1, abs=0.3)
    assert rows[-1]["staleness_max"] == AHEAD, "the server is faster than training here"
