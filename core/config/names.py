"""Names in a configuration that become folders, and so must not lead anywhere else."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

MOST_BYTES = 200
"""Of one folder's name. File systems take 255, and `.partial`, `.replaced` and digests are added to it."""


def one_folder(name: str) -> str:
    """The name itself; ValueError where it is not the plain name of one folder."""
    if "/" in name:
        raise ValueError(f"{name!r} is to be the name of one folder, without slashes")
    return folders(name)


def folders(name: str) -> str:
    """The name itself; ValueError where it is not one folder within another, or one within that, and so on."""
    for part in name.split("/"):
        if not part or part.startswith(".") or part != part.strip():
            raise ValueError(
                f"{name!r} is to name a folder below another one: no part of it may be empty, or begin with a dot or "
                "begin or end with a space"
            )
        if not part.isprintable() or len(part.encode(errors="replace")) > MOST_BYTES:
            raise ValueError(f"{name!r} has unprintable characters, or a part of more than {MOST_BYTES} bytes")
    return name


FolderName = Annotated[str, AfterValidator(one_folder)]
FolderPath = Annotated[str, AfterValidator(folders)]
"""Folders within folders, as in `study/policies/grm-1`."""
