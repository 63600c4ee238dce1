"""PPO that samples from a vLLM server in another process, with its weights synced over HTTP and a shared file."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from core.config import NATIVE_DTYPE
from core.http import ask_json
from core.ranks import free_port
from tests.builders.processes import GRM, ROOT, answers, background, wait_for


@pytest.mark.long
@pytest.mark.e2e
def test_ppo_with_a_vllm_server_that_samples_while_it_trains(run_dir, policy_path, tmp_path):
    for stage in ("prompts", "preferences", "rm"):
        shutil.copytree(run_dir / stage, tmp_path / "smoke" / stage)
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    with background(*GRM, "vllm-serve", "-c", "configs/smoke.yaml", "--port", port, log=log) as server:
        wait_for(lambda: answers(f"{url}/v1/models"), server)
        job = [*GRM, "ppo", "-c", "configs/smoke.yaml", f"run.dir={tmp_path}", "ppo.steps=3",
               f"ppo.vllm_servers=[{url}]", "ppo.overlap=true", "ppo.ema=0.5"]  # fmt: skip
        done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    out = tmp_path / "smoke" / "ppo"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl_nats_per_response"] == 0.0 and rows[2]["kl_k3_nats_per_response"] > 0
    assert all(row["mismatch_mean_abs"] < 0.2 for row in rows)
    if NATIVE_DTYPE == "float32":  # otherwise rounding hides such small updates
        assert all(row["sync_slope"] == pytest.approx(1, abs=0.05) for row in rows)
        # The second rollout was begun before the first update: it is the reference's, and the actor has been updated.
        assert abs(rows[1]["kl_nats_per_response"]) < 1e-4 and rows[2]["kl_k3_nats_per_response"] > 1e-6
        assert 10 * rows[0]["mismatch_mean_abs"] < rows[1]["mismatch_mean_abs"]
    assert not (out / "sync").exists()
    last, average, base = (
        load_file(folder / "model.safetensors") for folder in (out / "policy", out / "policy-ema", policy_path)
    )
    changed = [k for k, w in last.items() if not torch.equal(w, base[k].to(w.dtype))]
    assert changed and average.keys() == last.keys()
    for k in changed:  # an average of the way from the base to the last policy: nearer to both than they are
        way = (last[k] - base[k]).float().norm()
        assert 0 < (average[k] - base[k]).float().norm() < way and (average[k] - last[k]).float().norm() < way


@pytest.mark.long
def test_overrides_reach_a_server(policy_path, tmp_path):
    port = free_port()
    url, overrides = f"http://127.0.0.1:{port}", "{max_num_batched_tokens: 160, enable_prefix_caching: false}"
    command = [*GRM, "vllm-serve", "-c", "configs/smoke.yaml", f"generation.vllm.overrides={overrides}"]
    with background(*command, "--port", port, log=tmp_path / "log") as server:
        wait_for(lambda: answers(f"{url}/v1/models"), server)
        found = json.dumps(ask_json(f"{url}/server_info?config_format=json", None, 10))
        assert '"max_num_batched_tokens": 160' in found and '"enable_prefix_caching": false' in found
        assert '"logprobs_mode": "processed_logprobs"' in found
        assert ask_json(f"{url}/reset_prefix_cache", {}, 10) == {"success": True}
