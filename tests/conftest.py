"""Fixtures of all tests: seeds, the real models, and one finished run."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders.inputs import fuzz
from tests.builders.processes import ROOT, SEED, make
from tests.builders.tokenizers import first_tokens

POLICY = ROOT / "models" / "SmolLM2-135M-Instruct"


def pytest_report_header() -> str:
    return f"RLHF_TEST_SEED={SEED} (what tests draw at random depends on it)"


def pytest_sessionfinish(exitstatus: int) -> None:
    if fuzz.TABLE and exitstatus == 0:
        fuzz.write_table_of_cases(Path(fuzz.TABLE))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def policy_path() -> Path:
    if not (POLICY / "model.safetensors").is_file():
        pytest.skip(f"no {POLICY.relative_to(ROOT)}: run `make setup`")
    return POLICY


@pytest.fixture(scope="session")
def tokenizer_path(policy_path, tmp_path_factory) -> Path:
    """The real tokenizer and chat template with its first 2,048 tokens: for models that are tiny anyway."""
    return first_tokens(policy_path, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def small_policy(policy_path, tmp_path_factory) -> Path:
    """The first four layers of the real model: for what does not depend on what it says."""
    from core.config import Model
    from core.data.chat import ChatTokenizer
    from core.models.loading import load_causal_lm, save_lm

    where, folder = Model(path=str(policy_path)), tmp_path_factory.mktemp("small") / "policy"
    lm = load_causal_lm(where, dtype="bfloat16", num_layers=4)
    save_lm(folder, lm.config, lm.named_parameters(), ChatTokenizer(where))
    return folder


@pytest.fixture(scope="session")
def run_dir(policy_path, tmp_path_factory) -> Path:
    """A finished `make rm ppo eval` of configs/smoke.yaml, to read and to copy from."""
    runs = tmp_path_factory.mktemp("runs")
    make("rm", "ppo", "eval", "CONFIG=configs/smoke.yaml", f"SET=run.dir={runs}")
    return runs / "smoke"
