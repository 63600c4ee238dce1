"""The state that a long stage can be continued from: which one is whole, and of how many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.artefacts import RESUME
from core.errors import ArtefactError
from core.files import digest, read_json, write_json

LAST = "last.json"
"""File in the folder of resumable states; it names the last step whose state is whole."""
SEAL = "digest"
"""Key in that file: the digest of all else in it."""


def mark_state(out: Path, state: dict[str, Any]) -> None:
    """Say, after a state was written below `out`, that it is whole and what else belongs to it."""
    write_json(out / RESUME / LAST, {**state, SEAL: digest(state)})


def saved_state(out: Path, ranks: int) -> dict[str, Any]:
    """What `mark_state` wrote last below `out`; step 0 where it wrote nothing.

    Raises:
        ArtefactError: the state was written by another number of ranks, or the file is damaged.
    """
    mark = out / RESUME / LAST
    state: dict[str, Any] = read_json(mark) if mark.is_file() else {"step": 0}
    if state.pop(SEAL, None) not in (None, digest(state)):  # those of earlier versions have none
        raise ArtefactError(f"{mark} is damaged: delete {mark.parent} to start the stage again")
    if state["step"] and state["ranks"] != ranks:
        raise ArtefactError(
            f"{mark} was written by {state['ranks']} ranks and there are {ranks} now: "
            f"start as many (engine.processes), or delete {mark.parent} to start again"
        )
    return state


def last_step(folder: Path) -> int:
    """The step that a finished or unfinished folder can be continued after; 0 where it holds no state."""
    mark = folder / RESUME / LAST
    return int(read_json(mark)["step"]) if mark.is_file() else 0
