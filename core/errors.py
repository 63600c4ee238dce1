"""Errors that the command line prints as one message, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def made_by_library(what: str) -> Iterator[None]:
    """Whatever a library raises while it reads or builds something of people's files becomes an ArtefactError.

    Libraries check little of what they read: an odd value in `config.json` may raise any error, anywhere.

    Args:
        what: begins the message, and names the file or folder.
    """
    try:
        yield
    except (ArtefactError, DataError, ConfigError, Busy, MemoryError):
        raise
    except Exception as error:
        from core.whereabouts import is_loss

        if "OutOfMemory" in type(error).__name__ or is_loss(error):  # the files are not at fault
            raise
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ArtefactError(f"{what} ({type(error).__name__}: {said[:300]})") from error


class Busy(RuntimeError):
    """Another process writes what this one was to write; the command line prints who, and exits `EXIT_BUSY`."""
