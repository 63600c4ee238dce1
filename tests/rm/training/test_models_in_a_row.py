"""A stage that trains many reward models has one of them in memory."""

import json

import pytest

from tests.builders.planted_pairs import write_base
from tests.builders.processes import run_program

LAYOUTS = ["0:float32", "0:bfloat16", "1:bfloat16", "2:bfloat16", "3:bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_of_a_reward_model_stays_in_memory(tokenizer_path, tmp_path, ranks):
    """DeepSpeed kept each by its hooks, so that the 36 models of a study did not fit into 24 GB."""
    base = write_base(tokenizer_path, tmp_path / "base")
    run_program("tests/programs/training/models_in_a_row.py", base, tmp_path / "out", *LAYOUTS, ranks=ranks)
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert found == {layout: [[False] * 5] * 3 for layout in LAYOUTS}
