"""What nobody foresaw ends in one line and a file with all that its mending needs."""

from __future__ import annotations

import errno
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from core.machine import describe
from core.reporting.redaction import redacted

EXIT_CRASHED = 70
"""EX_SOFTWARE of sysexits.h: a fault of this project, or of a library."""
CRASHES = Path("runs", "crashes")
REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EMFILE, errno.EIO,
    errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EFBIG, errno.ESTALE,
)  # fmt: skip
"""Errors of the system that say what is wrong: no space, no permission, no such file."""
FULL = os.strerror(errno.ENOSPC)
CUT_SHORT = ("inline_container.cc", "unexpected pos")
"""What torch says where the system has written less of an archive than it was given, and does not say why."""
LONGEST = 300
"""Characters of an error's message that are shown."""


def refusal(error: Exception) -> str | None:
    """What the system refused, with the file; None where that does not say what is wrong."""
    if not isinstance(error, OSError):  # libraries that write in other languages have errors of their own
        if all(word in str(error) for word in CUT_SHORT):
            return f"a state could not be written whole: {FULL}"
        return next((line for line in str(error).splitlines() if FULL in line), None)
    if error.errno not in REFUSALS or error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([str(error.strerror), *([" -> ".join(files)] if files else [])])


def crash(error: BaseException, command: Sequence[str]) -> str:
    """Write the crash file; the end of the line that tells of it.

    Args:
        command: the words that were typed.
    """
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    said = redacted(f"{type(error).__name__}: {said}" if said else type(error).__name__)
    text = redacted("\n".join([
        f"command   {' '.join(command)}",
        f"rank      {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}",
        f"when      {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        *_described(),
        "",
        "".join(traceback.format_exception(error)),
    ]))  # fmt: skip
    name = f"grm-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (CRASHES, Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"{said[:LONGEST]}; this was not foreseen, and {folder / name} has what a report needs"
    return f"{said[:LONGEST]}; this was not foreseen, and no file could be written about it:\n{text}"


def _described() -> list[str]:
    try:
        return describe(device=False)  # importing torch may be what failed
    except Exception as error:
        return [f"the machine could not be described: {error!r}"]
