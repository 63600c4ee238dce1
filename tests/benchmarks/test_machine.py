"""What others use of the CPU is told apart from what we and our programs use."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import OthersShare, _descendants, describe, in_words

BUSY = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass"


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="no /proc")
def test_children_of_children_are_ours():
    watch = OthersShare()
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", nested]) as process:
        before = watch._own()
        while process.poll() is None:
            watch.note()
    assert watch._own() - before > 100  # three seconds of a core are 300 ticks, on a machine that others may use
    assert 0 <= watch.share() <= 1


def test_descendants_begin_with_the_process_itself():
    import os

    assert os.getpid() in dict(_descendants(os.getpid()))


def test_the_machine_in_words():
    assert describe()["cores"] >= 1
    machine = {"cpu": "X", "cores": 4, "memory_gib": 8.0, "matrix_instructions": [], "dtype": "float32", "gpu": None}
    assert in_words(machine) == "X, 4 cores, no bfloat16 instructions, float32"
    assert in_words(machine | {"gpu": "H100", "dtype": "bfloat16"}) == "H100, bfloat16"
