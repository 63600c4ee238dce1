"""SIGTERM ends a long stage after its current step: state saved, and an exit status that asks for another go."""

from __future__ import annotations

import signal

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again (Slurm: `scontrol requeue`)."""
MARK = "stopped"
"""File in the stage's unfinished folder: torchrun has an exit status of its own, so the ranks' is left here."""


class Stopped(Exception):
    """The stage was asked to stop and has saved its state."""


class StopSignal:
    """Remembers SIGTERM; all ranks agree on it at a point where all of them ask."""

    def __init__(self):
        self._received = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_) -> None:
        self._received = True

    def asked(self) -> bool:
        from core.training import (
            distributed,  # the launcher, which reads EXIT_STOPPED, needs no torch
        )

        return distributed.global_sum(float(self._received))[0] > 0
