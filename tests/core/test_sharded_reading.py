"""Weights that go from the files straight into ZeRO-3's shards, on two ranks of this machine."""

import json

import pytest

from tests.builders.processes import run_program

ALLOWED = 24 << 20
"""Bytes beside weights: the passes of the checks, and what is allocated for the first time."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
"""glibc keeps freed memory for the next time, but for that of blocks of some MB, as large models consist of. With this
the blocks of a small one are given back too, so that what is measured is what the process holds."""


@pytest.fixture(scope="module")
def found(tokenizer_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("reading")
    run_program("tests/programs/sharded_reading.py", tokenizer_path, out, ranks=2, **GIVES_BACK)
    return json.loads((out / "found.json").read_text())


@pytest.mark.slow
def test_the_weights_are_those_that_are_read_whole(found):
    """Of architectures with tied and untied heads, joined maps, GPT-2's turned ones, and a part that reads images."""
    assert all(found["families"].values()), found["families"]


@pytest.mark.slow
def test_what_does_not_fit_is_refused_on_every_rank(found):
    """Else the rank that goes on waits for the other, and the program does not end."""
    refused = found["refused"]
    for case in ("missing", "unexpected", "other shape"):
        assert "does not fit its architecture" in refused[case]
    assert "mlp.up_proj.weight" in refused["missing"] and "'more'" in refused["unexpected"]
    assert "damaged, cut short or not there" in refused["cut short"]


@pytest.mark.slow
def test_no_rank_holds_a_whole_model(found):
    """Its resident memory rises by a share, and by a layer as it is gathered: once in a buffer, once in its place."""
    assert found["files"] > 3 and found["whole"] > 150e6
    most = found["whole"] / found["ranks"] + 2 * found["layer"] + ALLOWED
    assert all(growth < most < found["whole"] for growth in found["growth"]["into shards"]), found
    assert all(growth > found["whole"] for growth in found["growth"]["whole"]), found
