"""Errors of libraries that read people's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import ArtefactError, Busy, ConfigError, DataError
from core.whereabouts import is_loss


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
        if "OutOfMemory" in type(error).__name__ or is_loss(error):  # the files are not at fault
            raise
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ArtefactError(f"{what} ({type(error).__name__}: {said[:300]})") from error
