"""configs/unified.yaml from rows in the layout of Unified-Feedback to trained reward models, on a tiny base."""

import os
from pathlib import Path

import pytest
import torch

from core.config import Config
from core.config.load import load
from core.data.rows import PromptRow
from core.data.splits import prompt_id
from core.files import write_table
from pipelines.import_pairs import import_pairs
from rm import train
from rm.pairs import batch_plan, tokenise
from rm.variants import build
from tests.builders.pair_files import chat, unified, write
from tests.builders.plain_engine import PlainEngine
from tests.builders.planted_pairs import write_base
from tests.builders.processes import ROOT

REAL = Path(os.environ.get("RLHF_DATA", ROOT.parent / "shared" / "data")) / "unified" / "oasst_en100.jsonl"


@pytest.fixture(scope="module")
def base(tokenizer_path, tmp_path_factory) -> Path:
    return write_base(tokenizer_path, tmp_path_factory.mktemp("unified") / "base")


def rows() -> list[dict]:
    """Ties, a source of posts to summarise, ratings of two scales, and chats of several turns."""
    found = [unified(prompt=f"question {i}", first=f"good {i}", second="bad") for i in range(60)]
    found += [unified(2, 2, prompt=f"tie {i}") for i in range(20)]
    found += [
        unified(3, 7, source="openai/summarize_from_feedback", prompt=f"post {i}", second=f"a {i}") for i in range(20)
    ]
    start = chat("hello", "yes?", "go on")
    several = {"conv_A": [*start, *chat("", "x")[1:]], "conv_B": [*start, *chat("", "y")[1:]]}
    return [*found, unified() | several]


def configured(base: Path, path: Path, *overrides: str) -> Config:
    source = "preferences.sources.unified"
    return load(
        [ROOT / "configs" / "unified.yaml"],
        [f"{source}.path={path}", f"{source}.subset=null", f"rm.base.path={base}", "engine.dtype=float32", *overrides],
    )


def imported(cfg: Config, tmp_path: Path) -> list[dict]:
    prompt = [{"role": "user", "content": "What is asked in the evaluation?"}]
    row = {"prompt_id": prompt_id(prompt), "prompt": prompt, "num_tokens": 9, "split": "eval", "order": 0.0}
    write_table(tmp_path / "prompts.parquet", [row], PromptRow)
    return import_pairs(cfg.preferences, cfg.data, prompts=tmp_path, seed=cfg.run.seed)[0]["rm_train"]


def trained(cfg: Config, name: str, pairs: list[dict], steps: int = 2) -> list[dict]:
    variant = cfg.rm.variants[name]
    model, tokenizer = build(cfg.rm, cfg.engine, variant, cfg.run.seed)
    tokens, _ = tokenise(pairs, tokenizer, cfg.rm, variant)
    weights = [p for p in model.parameters() if p.requires_grad]
    assert len(weights) < len(list(model.parameters()))  # adapters and the head
    passes = cfg.rm.global_batch // cfg.rm.micro_batch
    engine = PlainEngine(model, torch.optim.AdamW(weights, lr=1e-3), passes)
    if variant.text_regulariser == "dpo":
        tokens = train.with_reference(engine, model, tokens, cfg.rm.micro_batch)
    plan = batch_plan(tokens, cfg.rm, variant, cfg.run.seed)[:steps]
    return [train.train_step(engine, model, variant, [tokens[i] for i in batch], None) for batch in plan]


def test_rows_of_its_layout_become_the_papers_pairs(base, tmp_path):
    cfg = configured(base, write(tmp_path / "u.jsonl", *rows()), "preferences.sources.unified.stride=1")
    pairs = imported(cfg, tmp_path)
    assert 50 < len(pairs) <= 81 and not any(pair["prompt"][0]["content"].startswith("tie") for pair in pairs)
    posts = [pair for pair in pairs if "summarize" in pair["source"]]
    assert posts and all(pair["prompt"][0]["content"].startswith("Generate one-sentence summary") for pair in posts)
    assert {pair["margin"] for pair in posts} == {4.0}
    logs = {name: trained(cfg, name, pairs) for name in cfg.rm.variants}
    assert len(logs) == 8 and all(row["grad_norm"] > 0 for log in logs.values() for row in log)
    assert all((row["regulariser"] > 0) == name.startswith("grm") for name, log in logs.items() for row in log)
    assert logs["bt_margin"][0]["loss"] > logs["bt"][0]["loss"]


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason=f"no {REAL}: set RLHF_DATA to the folder of real sets")
def test_real_rows_of_its_layout(base, tmp_path):
    cfg = configured(base, REAL, "preferences.sources.unified.stride=4")
    pairs = imported(cfg, tmp_path)
    assert len(pairs) > 100
    assert all(row["loss"] > 0 for row in trained(cfg, "grm_sft", pairs))
