"""How long a stage takes from its command to its first useful work, and less of it spent on collecting garbage.

Importing torch, transformers and vLLM makes millions of objects that live to the end, and the collector looks through
all of them again and again meanwhile: a third of the time of a start.
"""

from __future__ import annotations

import gc
import os
import time

BEGAN = "GRM_STAGE_BEGAN"
"""Environment variable: when the command for this stage began, by the monotonic clock, which all processes of a machine
share and nobody sets back."""
_THRESHOLDS = gc.get_threshold()
_began = float(os.environ.get(BEGAN, time.monotonic()))
_working: float | None = None


def collect_less() -> None:
    """Collect garbage rarely until the first useful work begins (`working`)."""
    gc.set_threshold(100_000, 50, 100)


def command_began() -> float:
    """When the command began that this process, or its present stage, is for, by the monotonic clock."""
    return _began


def working() -> None:
    """Called where a stage has loaded what it needs and begins to work; only the first call counts."""
    global _working
    if _working is None:
        _working = time.monotonic()
        gc.freeze()  # what was imported and loaded stays
        gc.set_threshold(*_THRESHOLDS)


def collect() -> None:
    """Free models that nothing refers to any more but they themselves, those among them that `working` has frozen."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def finished(called: float) -> tuple[float, dict[str, float]]:
    """Seconds that a stage took, and how they begin.

    Args:
        called: when the stage's own function was called, by the monotonic clock.

    Returns:
        Seconds from the command to now; and of these `start`, those up to the first useful work, and `load`, the part
        of `start` in the stage's own function. A stage that does not call `working` loads nothing.
    """
    global _began, _working
    began, working, _began, _working = _began, _working or called, time.monotonic(), None
    return _began - began, {"start": working - began, "load": working - called}
