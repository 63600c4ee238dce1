"""What a stage depends on."""

import pytest

from core.config import Config, Gold
from core.errors import ArtefactError
from pipelines.stages import Stage, fingerprint


def test_gold_that_is_not_trained_yet_is_named(tmp_path):
    stage = Stage("label", "module", (), (), ("gold.path",))
    cfg = Config(gold=Gold(kind="checkpoint", path=str(tmp_path / "runs" / "gold" / "rm" / "gold")))
    with pytest.raises(ArtefactError, match="a run of its own: `make rm CONFIG"):
        fingerprint(stage, cfg)
