"""Errors that the command line prints as one message, without a traceback."""

from __future__ import annotations

EXIT_REFUSED = 2
"""The message names what is wrong with the command, its configuration or its files."""
EXIT_LOST = 76
"""A rank of the stage was lost, or its machine: the same command goes on from what is saved. EX_PROTOCOL of
sysexits.h."""
EXIT_BUSY = 4
"""Nothing is wrong with the command: run it again when the other one has ended."""


class ArtefactError(RuntimeError):
    """An input is missing, stale or damaged; the message says which stage to run, or what else to do."""


class DataError(ValueError):
    """A row, prompt or tokenizer that cannot be used; the message names it and says what to do."""

    together = False
    """Whether all ranks raise it, with one message: the first one prints it."""


class ConfigError(ValueError):
    """Bad configuration; the command line prints the message and exits 2, without a traceback."""


class Busy(RuntimeError):
    """Another process writes what this one was to write; the command line prints who, and exits `EXIT_BUSY`."""
