"""The unbroken run that broken ones are compared with."""

import subprocess
from pathlib import Path

import pytest

from tests.builders.inputs.tiny_run import tiny_run
from tests.builders.processes import GRM, ROOT


@pytest.fixture(scope="package")
def whole(tokenizer_path, tmp_path_factory) -> Path:
    """The folder of a finished run of two ranks, with its configuration in `config.yaml`."""
    folder = tmp_path_factory.mktemp("whole")
    command = [*GRM, "ppo", "--config", str(tiny_run(tokenizer_path, folder))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder
