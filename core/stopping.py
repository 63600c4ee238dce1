"""SIGTERM ends a long stage after its current step, with its state saved and an exit status of its own."""

from __future__ import annotations

import signal

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again (Slurm: `scontrol requeue`)."""
MARK = "stopped"
"""File in the stage's unfinished folder: torchrun has an exit status of its own, so the ranks' is left here."""


class Stopped(Exception):
    """The stage received SIGTERM and has saved its state."""


class StopSignal:
    """Remembers SIGTERM, for all ranks to act on at the same point."""

    def __init__(self):
        self._received = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_) -> None:
        self._received = True

    def requested(self) -> str | None:
        """Who has received SIGTERM, in words, or None; every rank must call it."""
        from core.training import distributed  # here, since the launcher reads EXIT_STOPPED and needs no torch

        world = distributed.world_size()
        received = distributed.global_sum(*(float(self._received and i == distributed.rank()) for i in range(world)))
        ranks = [i for i, count in enumerate(received) if count]
        if not ranks:
            return None
        return "SIGTERM" if len(ranks) == world else f"SIGTERM {distributed.of_ranks(ranks)}"
