"""No stage computes with damaged files: its inputs are checked before it starts."""

from __future__ import annotations

from pathlib import Path

from core.artefacts import read_manifest
from core.config import Config
from core.damage import WEIGHTS, Fault, look
from core.errors import ArtefactError
from pipelines.stages import STAGES

MOST_SHOWN = 10


def check_inputs(name: str, cfg: Config) -> None:
    """ArtefactError where a file of a stage that `name` reads is not what was written."""
    stage = STAGES[name]
    for needed in stage.inputs_in(cfg):
        check(needed, cfg.run_dir / needed, f"stage {name!r} needs {needed!r}, and", weights=stage.opens_weights)


def check(name: str, folder: Path, why: str, *, weights: bool = True) -> None:
    """ArtefactError for a finished stage whose files are not what was written.

    Args:
        why: how the message begins.
        weights: False where nothing opens the weights in the folder.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    if faults := look(folder, manifest, without=() if weights else WEIGHTS).faults:
        raise ArtefactError(
            "\n".join([f"{why} files in {folder} are not what it wrote:", *_lines(faults), remedy(name)])
        )


def remedy(name: str) -> str:
    return (
        f"`grm {name} --force` makes it again with the options of this command, and keeps what is there in .replaced; "
        "or put the files back from a copy"
    )


def _lines(faults: list[Fault]) -> list[str]:
    more = [f"  and {len(faults) - MOST_SHOWN} more"] if len(faults) > MOST_SHOWN else []
    return [*(f"  {fault}" for fault in faults[:MOST_SHOWN]), *more]
