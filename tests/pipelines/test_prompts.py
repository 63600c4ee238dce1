"""The stage that collects prompts."""

import json

from core.config import Config
from pipelines.prompts import run


def test_prompts_stage_counts_what_it_drops(policy_path, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"What is {i} plus {i + 1}, and why?"} for i in range(50)]
    rows += [rows[0], {"prompt": "word " * 500}, {"prompt": ""}, {"text": "x"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    cfg = Config.model_validate(
        {"policy": {"path": str(policy_path)}, "data": {"prompts": file, "max_prompt_tokens": 100}}
    )
    metrics = run(cfg, {}, tmp_path)
    assert sum(metrics["prompts"].values()) == 50
    assert sum(metrics["rejected"].values()) == 4 and metrics["rejected"]["duplicate"] == 1
    lines = [json.loads(x)["line"] for x in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert lines == [51, 52, 53, 54]
