"""A run with `ppo.ema`: the average of its weights is evaluated. Some five minutes."""

import os
import subprocess

import numpy as np
import pytest

from core.artefacts import read_manifest
from core.data.rows import EvaluationRow
from core.files import read_table
from tests.builders.processes import GRM, ROOT


@pytest.mark.long
@pytest.mark.e2e
def test_the_average_lies_between_the_reference_and_the_last_policy(run_dir):
    """In KL, as its weights do; and the table of the steps is without it."""
    options = ["-c", "configs/smoke.yaml", "--from", run_dir, f"run.dir={run_dir.parent}", "run.name=average",
               "ppo.ema=0.7", "ppo.actor.lr=1e-3"]  # fmt: skip
    for stage in ("ppo", "eval"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*GRM, stage, *options], cwd=ROOT, env=environment, check=True, timeout=1800)
    folder = run_dir.with_name("average") / "eval"
    rows, average = (read_table(folder / f"{name}.parquet", EvaluationRow) for name in ("rl_eval", "rl_eval_average"))
    last = [row for row in rows if row["step"] == 3]
    assert {row["step"] for row in rows} == {0, 2, 3} and {row["step"] for row in average} == {3}
    assert {row["prompt_id"] for row in average} == {row["prompt_id"] for row in last}
    kl = lambda table: float(np.mean([row["kl_rb"] for row in table]))  # noqa: E731
    assert 0 < kl(average) < kl(last)
    metrics = read_manifest(folder)["metrics"]
    assert metrics["average"]["kl"] == pytest.approx(kl(average)) and "; policy-ema: " in metrics["headline"]
