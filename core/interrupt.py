"""Ctrl-C while a program imports its modules ends it without a traceback.

Import this module first, and call `answer` when all others are there: from then on Ctrl-C is a KeyboardInterrupt, which
the program catches.
"""

from __future__ import annotations

import signal

_before = signal.signal(signal.SIGINT, signal.SIG_DFL)


def answer() -> None:
    """Ctrl-C has its effect of before the import of this module."""
    signal.signal(signal.SIGINT, _before)
