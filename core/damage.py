"""Whether the files of a finished stage are still those that its manifest lists.

A file is read once, and its SHA-256 compared. The digest is then remembered by the file's inode, size and times, in the
run's folder, so that another look costs nothing until the file is written to, copied or moved to another disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from core.artefacts import FINGERPRINT, MANIFEST, REPLACED, RESUME, read_manifest
from core.errors import ArtefactError
from core.files import write_json

OWN = ".grm"
"""Folder of a run for what is remembered about it: nothing in it is a result."""
DIGESTS = "digests.json"
LOOSE = ("tensorboard/*", "*.log", "*.md", "*.tmp")
"""Files that may change after a stage has finished, and files of these names that may be added. So may hidden ones."""
WEIGHTS = ("*.safetensors",)
SHOWN_BYTES = 10**9
"""Reading more than this shows a progress bar."""
CHUNK = 2**20

Key = str


class Fault(NamedTuple):
    path: Path
    what: str
    """The end of a sentence that begins with the path."""

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


class Found(NamedTuple):
    faults: list[Fault]
    unread: int
    """Bytes of files that were not read, since that was more than `most_bytes`; only their sizes were compared."""


def look(
    folder: Path, manifest: Mapping[str, Any], *, without: Iterable[str] = (), again: bool = False,
    most_bytes: float = float("inf"), below: str = "",
) -> Found:  # fmt: skip
    """What is wrong with the files of a finished stage: missing, cut short, changed, or not written by the stage.

    Args:
        without: patterns of names that are passed over, such as WEIGHTS where nothing opens them.
        again: read every file, whatever is remembered.
        most_bytes: read at most so much, else nothing that is not remembered.
        below: only the files whose paths begin so.
    """
    passed = (*LOOSE, *without)
    ours = [o for o in manifest["outputs"] if o["path"].startswith(below)]
    listed = {o["path"]: o for o in ours if not matches(o["path"], passed)}
    faults, sizes = _by_size(folder, listed)
    known = {} if again else remembered(folder)
    keys = {path: _key(folder / path) for path in sizes}
    fresh = {path: known[key] for path, key in keys.items() if known.get(key) == listed[path]["sha256"]}
    # What is remembered may be damaged itself, so that no file is called damaged which has not been read.
    doubtful = {path for path, key in keys.items() if key in known and path not in fresh}
    unread = {path for path in sizes if path not in fresh}
    left = sum(sizes[path] for path in unread - doubtful)
    if left > most_bytes:
        unread = doubtful
    fresh |= _read(folder, sorted(unread), sum(sizes[path] for path in unread))
    remember(folder, {keys[path]: sha for path, sha in fresh.items() if sha})
    left = left if left > most_bytes else 0
    faults += [
        Fault(folder / path, "cannot be read" if not sha else "is not what was written: its SHA-256 is another")
        for path, sha in fresh.items()
        if sha != listed[path]["sha256"]
    ]
    outputs = {o["path"] for o in manifest["outputs"]}
    extra = [path for path in _extra(folder, outputs, passed) if path.startswith(below)]
    faults += [Fault(folder / path, "was not written by the stage") for path in extra]
    return Found(sorted(faults), left)


def check_part(folder: Path) -> None:
    """ArtefactError where a folder is part of a finished stage and is not what the stage wrote; say, a reward model.

    Nothing is known of folders that are part of none.
    """
    for stage in (folder.parent, folder.parent.parent):
        manifest = read_manifest(stage) or {}
        below = f"{folder.relative_to(stage)}/"
        if any(output["path"].startswith(below) for output in manifest.get("outputs", ())):
            if faults := look(stage, manifest, below=below).faults:
                found = "\n  ".join(map(str, faults))
                raise ArtefactError(
                    f"{folder} is not what stage {manifest['stage']!r} wrote:\n  {found}\nrun that stage again with "
                    "--force, or put the files back from a copy"
                )
            return


def _by_size(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> tuple[list[Fault], dict[str, int]]:
    """What a look at sizes tells, and the sizes of the other files."""
    faults, sizes = [], {}
    for path, output in listed.items():
        file = folder / path
        size = file.stat().st_size if file.is_file() else None
        wanted = output.get("bytes", size)  # manifests of the first version have none
        if size is None:
            faults.append(Fault(file, "is missing"))
        elif size != wanted:
            how = "is empty" if not size else "is cut short" if size < wanted else "is too long"
            faults.append(Fault(file, f"{how}: {size} bytes, and {wanted} were written"))
        else:
            sizes[path] = size
    return faults, sizes


def _extra(folder: Path, outputs: set[str], passed: tuple[str, ...]) -> list[str]:
    found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    return [
        path for path in found
        if path not in outputs and path not in (MANIFEST, FINGERPRINT) and not matches(path, passed)
        and Path(path).parts[0] != RESUME
    ]  # fmt: skip


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path in a stage's folder, or its last part, has one of these patterns, or is hidden."""
    hidden = any(part.startswith(".") for part in Path(path).parts)
    return hidden or any(fnmatch(path, p) or fnmatch(Path(path).name, p) for p in patterns)


def _key(file: Path) -> Key:
    """Changes with every write and on every other disk. Who restores the time of writing changes the time of change."""
    stat = file.stat()
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _read(folder: Path, paths: list[str], size: int) -> dict[str, str]:
    """SHA-256 of each file; empty for one that cannot be read."""
    from tqdm import tqdm

    with tqdm(
        total=size, desc=f"checking {folder.name}", unit="B", unit_scale=True, disable=size < SHOWN_BYTES, leave=False
    ) as bar:

        def digest(path: str) -> str:
            sha = hashlib.sha256()
            try:
                with (folder / path).open("rb", buffering=0) as file:
                    while chunk := file.read(CHUNK):
                        sha.update(chunk)
                        bar.update(len(chunk))
            except OSError:
                return ""
            return sha.hexdigest()

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:  # hashing leaves Python's lock
            return dict(zip(paths, threads.map(digest, paths), strict=True))


def remembered(folder: Path) -> dict[Key, str]:
    """Digests by key, of all stages of the run that a stage's folder belongs to."""
    try:
        found = json.loads(_memory(folder).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(folder: Path, digests: Mapping[Key, str]) -> None:
    """Add to what is remembered; where the run's folder cannot be written, files are read again the next time."""
    before = remembered(folder)
    if not digests.items() <= before.items():
        with suppress(OSError):
            write_json(_memory(folder), {**before, **digests})


def remember_outputs(folder: Path) -> None:
    """A stage that has just been published has read its files for its manifest."""
    manifest = read_manifest(folder) or {"outputs": ()}
    remember(folder, {_key(folder / o["path"]): o["sha256"] for o in manifest["outputs"]})


def _memory(folder: Path) -> Path:
    run = folder.resolve().parent
    return (run.parent if run.name == REPLACED else run) / OWN / DIGESTS


def archive_fault(file: Path) -> str | None:
    """What is wrong with a file of `torch.save`, which is a ZIP archive; None where its checksums are right.

    `torch.load` does not compare them: of a flipped bit in a tensor it makes another number.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    # A damaged header may also name an offset before the file, or a compression that zipfile does not know.
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        return f"is cut short or damaged ({error})"
    return f"is damaged: the checksum of {damaged} is another" if damaged else None
