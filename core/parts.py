"""Finished parts of a stage that is still running: a killed stage goes on from them if they are what it wrote.

Beside a part, a hidden file has its digest. It is there before the part is, since other processes use a part as soon as
they see it. The manifest of the finished stage takes the place of these files.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from core.files import path_digest, write_json

MARK, UNFINISHED = ".whole", ".part"
"""Ends of the names of hidden files: the digest of a part, and a part that is being written."""


def write_part(part: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is a part, with its digest.

    Args:
        write: writes the file that it is given.
    """
    unfinished = part.with_name(f".{part.name}{UNFINISHED}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    write(unfinished)
    write_json(_mark(part), path_digest(unfinished))
    unfinished.replace(part)


def seal(part: Path) -> None:
    """Note that a folder with all files in it is a part, written to its end."""
    write_json(_mark(part), path_digest(part))


def drop_damaged(folder: Path) -> list[Path]:
    """Delete the parts below a folder that are not what was written, so that they are made again, and say so.

    Parts without a digest are believed: an earlier version wrote them. Call it before the processes of a stage start.
    """
    dropped = []
    for mark in sorted(folder.rglob(f".*{MARK}")):
        part = mark.with_name(mark.name[1 : -len(MARK)])
        if part.exists() and mark.read_bytes() == f'"{path_digest(part)}"\n'.encode():
            continue
        mark.unlink()
        if not part.exists():  # a kill came before it, or it was removed
            continue
        print(f"{part} is not what was written: it is made again", file=sys.stderr, flush=True)
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
        dropped.append(part)
    return dropped


def forget(folder: Path) -> None:
    """Delete the digests of all parts below a folder, and what was being written when it was killed."""
    for pattern in (f".*{end}{more}" for end in (MARK, UNFINISHED) for more in ("", ".tmp")):
        for file in folder.rglob(pattern):
            file.unlink()


def _mark(part: Path) -> Path:
    return part.with_name(f".{part.name}{MARK}")
