"""The main job on the real model, vLLM and two ZeRO-3 ranks: `make rm ppo eval`, small. Some five minutes."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from core.artefacts import open_partial
from core.config.load import load
from core.environment import variables
from core.files import read_table
from core.stopping import EXIT_STOPPED
from pipelines import stages
from tests.builders.processes import ROOT, free_port


def metrics(run_dir, stage):
    return json.loads((run_dir / stage / "manifest.json").read_text())["metrics"]


@pytest.mark.e2e
def test_ppo_trained_on_policy_with_synced_weights(run_dir):
    rows = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["kl_nats_per_response"] == 0.0  # the first rollout is the reference's own
    assert all(row["mismatch_mean_abs"] < 0.1 for row in rows)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert rows[-1]["kl_k3_nats_per_response"] > 0
    assert list((run_dir / "ppo" / "tensorboard").iterdir())


@pytest.mark.e2e
def test_a_stopped_and_killed_ppo_goes_on_to_the_unbroken_result(run_dir, tmp_path):
    """SIGTERM after the first step, SIGKILL at a random moment later, then left alone."""
    from safetensors.torch import load_file

    for stage in ("prompts", "preferences", "rm"):
        shutil.copytree(run_dir / stage, tmp_path / "smoke" / stage)
    job = [sys.executable, "-m", "pipelines", "ppo", "-c", "configs/smoke.yaml", f"run.dir={tmp_path}"]
    partial = tmp_path / "smoke" / "ppo.partial"
    with (tmp_path / "log").open("w") as log:
        stopped = subprocess.Popen(job, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: lines(partial / "metrics.jsonl"), stopped)
        stopped.terminate()
        assert stopped.wait(200) == EXIT_STOPPED, (tmp_path / "log").read_text()[-3000:]
        state = json.loads((partial / "state" / "last.json").read_text())
        assert state["step"] in (1, 2) and state["ranks"] == 2
        assert "ppo: stopped after step" in (tmp_path / "log").read_text()
        broken = subprocess.Popen(job, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        delay = random.uniform(5, 60)
        print(f"killed after {delay:.1f} s")
        time.sleep(delay)
        os.killpg(broken.pid, signal.SIGKILL)
        broken.wait()
    time.sleep(2)  # the ranks are in groups of their own where torchrun put them there
    subprocess.run(["pkill", "-9", "-f", f"run.dir={tmp_path}"], check=False)
    resumed = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    untimed = lambda row: {k: v for k, v in row.items() if "second" not in k}  # noqa: E731
    unbroken, found = (
        [untimed(json.loads(line)) for line in lines(at / "ppo" / "metrics.jsonl")]
        for at in (run_dir, tmp_path / "smoke")
    )
    assert found == unbroken
    unbroken, found = (load_file(at / "ppo" / "policy" / "model.safetensors") for at in (run_dir, tmp_path / "smoke"))
    assert unbroken.keys() == found.keys() and all(bool((unbroken[k] == found[k]).all()) for k in found)


def lines(file) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def wait_for(holds, process: subprocess.Popen, seconds: float = 400) -> None:
    deadline = time.time() + seconds
    while not holds() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)


@pytest.mark.e2e
def test_another_number_of_ranks_is_refused_by_name(run_dir, tmp_path):
    for stage in ("prompts", "rm", "preferences"):
        shutil.copytree(run_dir / stage, tmp_path / "smoke" / stage)
    job = [sys.executable, "-m", "pipelines", "ppo", "-c", "configs/smoke.yaml", f"run.dir={tmp_path}"]
    state = tmp_path / "smoke" / "ppo.partial" / "state" / "last.json"
    cfg = load([ROOT / "configs" / "smoke.yaml"], [f"run.dir={tmp_path}"])
    open_partial(cfg.run_dir / "ppo", stages.fingerprint(stages.STAGES["ppo"], cfg))
    state.parent.mkdir()
    state.write_text(json.dumps({"step": 2, "ranks": 8, "kl": {"coef": 0.1}, "scale": {}}))
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "was written by 8 ranks and there are 2 now" in done.stderr, done.stderr[-3000:]


@pytest.mark.e2e
def test_evaluation_measures_what_was_trained(run_dir):
    rows = read_table(run_dir / "eval" / "rl_eval.parquet")
    steps = {row["step"] for row in rows}
    assert steps == {0, 2, 3}
    assert all(row["kl_rb"] == pytest.approx(0, abs=1e-4) for row in rows if row["step"] == 0)
    assert sum(row["kl_rb"] for row in rows if row["step"] == 3) > 0
    eval_prompts = {r["prompt_id"] for r in read_table(run_dir / "prompts" / "prompts.parquet") if r["split"] == "eval"}
    assert {row["prompt_id"] for row in rows} <= eval_prompts
    trained_on = {row["prompt_id"] for row in read_table(run_dir / "preferences" / "pairs.parquet")}
    assert not trained_on & eval_prompts


@pytest.mark.e2e
def test_the_result_loads_as_it_is(run_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, info = AutoModelForCausalLM.from_pretrained(run_dir / "ppo" / "policy", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(run_dir / "ppo" / "policy").chat_template


@pytest.mark.e2e
def test_vllm_serves_the_result(run_dir, tmp_path):
    """An OpenAI-style chat request to the policy's folder; the server is what `vllm serve FOLDER` starts."""
    port = free_port()
    folder = run_dir / "ppo" / "policy"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port),
               "--max-model-len", "256", "--enforce-eager", "--served-model-name", "policy"]  # fmt: skip
    settings = {**os.environ, **variables(1), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)
        try:
            body = {"model": "policy", "max_tokens": 8, "messages": [{"role": "user", "content": "Name a fruit."}]}
            answer = ask(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert answer, (tmp_path / "log").read_text()[-3000:]
    assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 8


def ask(url: str, body: dict, server: subprocess.Popen) -> dict | None:
    """The answer once the server is up; None when it is not within some minutes."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.time() + 300
    while server.poll() is None and time.time() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(1)
    return None


@pytest.mark.e2e
def test_the_model_card_says_what_was_measured(run_dir):
    card = (run_dir / "ppo" / "policy" / "README.md").read_text()
    assert "Reward model (proxy)" in card and "GRM (sft)" in card and "not measured yet" in card
    full = (run_dir / "report" / "policy-card.md").read_text()
    assert "KL from the base policy" in full and "not measured yet" not in full and "in SD: proxy" in full


@pytest.mark.e2e
def test_report_is_one_page(run_dir):
    page = (run_dir / "report" / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and "grm" in page
    assert (run_dir / "report" / "report.md").is_file()
