"""Changes between checkpoints, over prompts."""

import numpy as np

from pipelines.evaluate import change


def test_change_is_paired():
    rng = np.random.default_rng(4)
    first = rng.normal(0, 100, size=50)  # far between prompts, which pairing takes out
    found = change(first, first + 0.5 + rng.normal(0, 0.01, 50), draws=500, seed=0)
    assert 0.49 < found["lo"] < found["mean"] < found["hi"] < 0.51 and found["se"] < 0.01
