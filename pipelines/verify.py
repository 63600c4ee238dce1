"""`grm verify`: whether the files of runs are still what their stages wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from core.artefacts import MANIFEST, read_manifest
from core.damage import look
from core.errors import ArtefactError
from pipelines import runs
from pipelines.stages import STAGES

SHARED_FILES = "study.yaml"
"""The configuration that `grm study` leaves in its run."""


def verify(folders: Iterable[Path]) -> Iterator[tuple[str, bool]]:
    """(line, whether all is well) of each finished stage of runs, and of the runs in folders below them.

    Every file is read, whatever is remembered of it. A stage that several runs are linked to is read once.

    Raises:
        ArtefactError: no finished stage in one of the folders.
    """
    seen: set[Path] = set()
    for folder in folders:
        found = list(runs.find_runs(folder)) if folder.is_dir() else []
        if not found:
            raise ArtefactError(f"no run {folder}; `grm runs` lists the runs")
        for run in found:
            for name in STAGES:
                stage = run / name
                if stage.is_symlink() and not stage.exists():
                    yield f"{stage}: is a link to {stage.resolve()}, which is not there", False
                elif stage.is_dir() and stage.resolve() not in seen:
                    seen.add(stage.resolve())
                    yield _verified(name, stage)


def _verified(name: str, folder: Path) -> tuple[str, bool]:
    try:
        manifest = read_manifest(folder)
    except ArtefactError as error:
        return str(error), False
    if manifest is None:
        return f"{folder}: has no {MANIFEST}; {_command(name, folder)}", False
    faults = look(folder, manifest, again=True).faults
    if not faults:
        return f"{folder}: {len(manifest['outputs'])} files are what was written", True
    return "\n".join([f"{folder}: damaged", *(f"  {fault}" for fault in faults), f"  {_command(name, folder)}"]), False


def _command(name: str, folder: Path) -> str:
    """How the stage is made again; of a study its configuration is known."""
    run = folder.parent
    config = next((r / SHARED_FILES for r in (run, run.parent.parent) if (r / SHARED_FILES).is_file()), None)
    if config and config.parent != run:
        return f"delete the folder, and `grm study --config {config.with_name('matrix.yaml')}` makes it again"
    which = f"--config {config}" if config else f"with the configuration of {run}"
    return f"`grm {name} --force` {which} makes it again"
