"""The files beside a saved state that a resumed run goes on with: logs, policies and rollouts of earlier steps."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from core.artefacts import RESUME
from core.errors import ArtefactError
from core.files import file_digest, path_digest
from ppo.measured.rollouts import FOLDER, tables

LOGS = ("metrics.jsonl", "held_out.jsonl")
"""Files that only grow."""


class SavedFiles:
    """What the first rank knows of the files of a run, to be saved with its state.

    Args:
        out: folder of the run.
    """

    def __init__(self, out: Path):
        self._out = out
        self._policies: dict[str, str] = {}
        self._rollouts: dict[str, str] = {}

    def add_policy(self, folder: Path) -> None:
        """Note the digest of a policy that has just been written: it is read once, and not with every state."""
        self._policies[str(folder.relative_to(self._out))] = path_digest(folder)

    def record(self, state: Path) -> dict[str, dict[str, Any]]:
        """What is there when a state has been saved: logs by size and digest, policies and rollouts by digest, and the
        state's own files by size alone, since what DeepSpeed writes has checksums.

        Args:
            state: folder of the state.
        """
        self._policies = {name: sha for name, sha in self._policies.items() if (self._out / name).is_dir()}
        logs = {name: self._out / name for name in LOGS if (self._out / name).is_file()}
        written = [str(table.relative_to(self._out)) for table in tables(self._out / FOLDER).values()]
        self._rollouts = {name: self._rollouts.get(name) or file_digest(self._out / name) for name in written}
        files = [p for p in sorted(state.rglob("*")) if p.is_file()]
        return {
            "logs": {name: [file.stat().st_size, file_digest(file)] for name, file in logs.items()},
            "policies": dict(self._policies),
            "rollouts": dict(self._rollouts),
            "state": {str(p.relative_to(self._out)): p.stat().st_size for p in files},
        }

    def go_on(self, then: dict[str, dict[str, Any]]) -> None:
        """Take from the logs what was written after the state, which a resumed run writes again.

        Args:
            then: of `record`.
        """
        self._policies, self._rollouts = dict(then["policies"]), dict(then.get("rollouts", {}))
        for name, (size, _) in then["logs"].items():
            os.truncate(self._out / name, size)


def check_saved(out: Path, then: dict[str, dict[str, Any]], *, keeps_all: bool) -> None:
    """Compare the files of a run with those that were there when its state was saved.

    Args:
        then: of `SavedFiles.record`.
        keeps_all: False where a later step may have deleted policies (`ppo.keep_policies`).

    Raises:
        ArtefactError: a file that is missing, or is not what was written; names it.
    """
    faults = [out / name for name, (size, sha256) in then["logs"].items() if _begin(out / name, size) != sha256]
    for name, sha in then["policies"].items():
        policy = out / name
        if keeps_all or policy.is_dir():
            faults += [] if policy.is_dir() and path_digest(policy) == sha else [policy]
    for name, sha in then.get("rollouts", {}).items():  # the oldest ones may be deleted by now
        faults += [out / name] if (out / name).is_file() and file_digest(out / name) != sha else []
    for name, size in then["state"].items():
        file = out / name
        faults += [] if file.is_file() and file.stat().st_size == size else [file]
    if faults:
        raise ArtefactError(
            f"{faults[0]} is missing or is not what was written: delete {out / RESUME} to start the stage again"
        )


def _begin(file: Path, size: int) -> str | None:
    """SHA-256 of the first bytes of a file; None where it is shorter."""
    if not file.is_file() or file.stat().st_size < size:
        return None
    sha, left = hashlib.sha256(), size
    with file.open("rb") as content:
        while left and (chunk := content.read(min(left, 2**20))):
            sha.update(chunk)
            left -= len(chunk)
    return sha.hexdigest()
