"""The main job on the real model, vLLM and two ZeRO-3 ranks: `make rm ppo eval`, small. Some five minutes."""

import json
import math
import sys

import pytest

from core.artefacts import read_manifest
from core.environment import variables
from core.files import read_table
from core.http import ask_json
from core.ranks import free_port
from pipelines import stages
from tests.builders.processes import answers, background, make, wait_for


@pytest.mark.e2e
def test_the_same_command_again_finds_everything_up_to_date(run_dir):
    again = make("rm", "ppo", "eval", "CONFIG=configs/smoke.yaml", f"SET=run.dir={run_dir.parent}", timeout=120)
    assert again.stderr.count("up to date") == 7, again.stderr


@pytest.mark.e2e
def test_manifests_say_how_long_each_stage_took_to_start(run_dir):
    for stage in stages.ALWAYS:
        made = read_manifest(run_dir / stage)
        assert 0 <= made["seconds_load"] <= made["seconds_start"] <= made["seconds"], stage
    for stage in ("preferences", "rm", "bon", "ppo", "eval"):  # models are loaded, then there is work
        made = read_manifest(run_dir / stage)
        assert 0 < made["seconds_load"] < made["seconds_start"] < made["seconds"], stage


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
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "ppo" / "policy")
    assert tokenizer.chat_template
    assert lm.generation_config.eos_token_id == tokenizer.eos_token_id == 2  # or it would not stop
    assert lm.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.e2e
def test_vllm_serves_the_result(run_dir, tmp_path):
    """An OpenAI-style chat request to the policy's folder; the server is what `vllm serve FOLDER` starts."""
    url, log = f"http://127.0.0.1:{free_port()}", tmp_path / "log"
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", run_dir / "ppo" / "policy",
              "--port", url.rpartition(":")[2], "--max-model-len", "256", "--enforce-eager",
              "--served-model-name", "policy"]  # fmt: skip
    settings = variables(1) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with background(*server, log=log, env=settings) as process:
        wait_for(lambda: answers(f"{url}/v1/models"), process)
        body = {"model": "policy", "max_tokens": 8, "messages": [{"role": "user", "content": "Name a fruit."}]}
        answer = ask_json(f"{url}/v1/chat/completions", body, 120)
    assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 8


@pytest.mark.e2e
def test_the_model_card_says_what_was_measured(run_dir):
    card = (run_dir / "ppo" / "policy" / "README.md").read_text()
    assert "Reward model (proxy)" in card and "GRM (sft)" in card and "not measured yet" in card
    full = (run_dir / "report" / "policy-card.md").read_text()
    assert "KL from the base policy" in full and "not measured yet" not in full and "SD within prompts" in full


@pytest.mark.e2e
def test_report_is_one_page(run_dir):
    page = (run_dir / "report" / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and "grm" in page and "Checkpoints" in page
    assert {"report.md", "curves.csv", "conditions.json", "policies.json", "checks.json", "policy-card.md"} <= {
        p.name for p in (run_dir / "report").iterdir()
    }
