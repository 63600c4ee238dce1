"""Runs as a whole: stages taken from another run, what there is, what differs, what is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.artefacts import (
    REPLACED,
    Fingerprint,
    keep_finished,
    kept_result,
    read_manifest,
    take_back,
)
from core.config import Config
from core.errors import ArtefactError
from pipelines.stages import STAGES, fingerprint, say, staleness


def needed_by(name: str) -> list[str]:
    """The stages that `name` reads, directly or through others, and itself, in the order of the table."""
    wanted = {name}
    for stage in reversed(STAGES.values()):
        if stage.name in wanted:
            wanted |= set(stage.inputs)
    return [stage for stage in STAGES if stage in wanted]


def check_source(cfg: Config, source: Path) -> Path:
    """The folder of the other run; ArtefactError when it holds no finished stage, or is the run itself."""
    if not any((source / stage).is_dir() and read_manifest(source / stage) for stage in STAGES):
        raise ArtefactError(f"--from {source}: no finished stage in that folder; `grm runs` lists the runs")
    if source.resolve() == cfg.run_dir.resolve():
        raise ArtefactError(f"--from {source} is this run itself: give it a name of its own, as in run.name=kl01")
    return source


def settle(name: str, cfg: Config, source: Path | None) -> bool:
    """Whether the stage is done without running: up to date, taken back from `.replaced`, or linked from another run.

    Raises:
        ArtefactError: an input is missing or out of date.
    """
    folder = cfg.run_dir / name
    if staleness(name, cfg) == []:
        say(f"{name}: up to date")
        return True
    wanted = fingerprint(STAGES[name], cfg)
    if kept := kept_result(folder, wanted):
        take_back(folder, kept)
        say(f"{name}: up to date again, with the result that was kept in {kept}")
        return True
    if source is not None and fits(source / name, wanted):
        if folder.exists():
            keep_finished(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        target = (source / name).resolve()
        folder.symlink_to(os.path.relpath(target, folder.parent.resolve()), target_is_directory=True)
        say(f"{name}: up to date, linked from {target.parent}")
        return True
    return False


def fits(folder: Path, wanted: Fingerprint) -> bool:
    """Whether a finished stage of another run is what this configuration would make."""
    manifest = read_manifest(folder)
    return manifest is not None and not wanted.differences(manifest)


def plan(name: str, cfg: Config, source: Path) -> list[tuple[str, str]]:
    """(stage, what will be done with it) of all that `name` needs, from content alone; nothing is changed."""
    steps: list[tuple[str, str]] = []
    settled: dict[str, Path] = {}
    for stage in needed_by(name):
        if changed := [i for i in STAGES[stage].inputs if i not in settled]:
            steps.append((stage, f"will run, because {', '.join(changed)} will be another"))
            continue
        wanted = fingerprint(STAGES[stage], cfg, settled)
        places = {"up to date": cfg.run_dir / stage, "linked": source / stage}
        if kept := kept_result(cfg.run_dir / stage, wanted):
            places = {"taken back from what was replaced": kept, **places}
        for what, folder in places.items():
            if fits(folder, wanted):
                settled[stage] = folder
                steps.append((stage, what))
                break
        else:
            manifest = read_manifest(source / stage)
            reason = wanted.differences(manifest)[0] if manifest else f"{source} has no {stage}"
            steps.append((stage, f"will run, because {reason}"))
    return steps


def folder_of(run: Path) -> Path:
    """A run that is named by its folder, or by its name in `runs/`."""
    return run if run.is_dir() else Path("runs") / run


def find_runs(folder: Path) -> Iterator[Path]:
    """Folders with a finished stage in them, at any depth, links not followed."""
    for path, folders, _ in os.walk(folder):
        here = Path(path)
        if any((here / stage / "manifest.json").is_file() for stage in STAGES):
            yield here
        folders[:] = sorted(
            f for f in folders
            if f not in STAGES and f != REPLACED and not f.endswith(".partial") and not (here / f).is_symlink()
        )  # fmt: skip


def list_runs(folder: Path) -> list[str]:
    """One block of lines a run: name, stages done, size, seconds, and the headline of each stage."""
    lines = []
    for run in find_runs(folder):
        manifests = {s: m for s in STAGES if (m := read_manifest(run / s))}
        done = ", ".join(s + (" (linked)" if (run / s).is_symlink() else "") for s in manifests)
        seconds = sum(m["seconds"] for s, m in manifests.items() if not (run / s).is_symlink())
        lines.append(f"{run.relative_to(folder)}  {human(size_of(run))}  {seconds / 60:.1f} min  {done}")
        lines += [f"    {s:<12} {m['metrics'].get('headline', '')}" for s, m in manifests.items() if s != "report"]
    return lines or [f"no run in {folder}"]


def diff(first: Path, second: Path) -> list[str]:
    """What differs in the configurations of two runs, and the headlines and numbers of their stages."""
    runs = [{s: m for s in STAGES if (m := read_manifest(run / s))} for run in (first, second)]
    for run, manifests in zip((first, second), runs, strict=True):
        if not manifests:
            raise ArtefactError(f"{run}: no finished stage in that folder; `grm runs` lists the runs")
    configs = [_merged(m["config"] for m in manifests.values()) for manifests in runs]
    keys = [k for k in sorted(configs[0].keys() | configs[1].keys()) if configs[0].get(k) != configs[1].get(k)]
    lines = [f"configuration of {first} and {second}:"]
    lines += [f"  {k}: {configs[0].get(k, 'not set')!r} | {configs[1].get(k, 'not set')!r}" for k in keys]
    lines += [] if keys else ["  the same"]
    for stage in STAGES:
        pair = [manifests.get(stage) for manifests in runs]
        if not any(pair):
            continue
        if pair[0] == pair[1]:
            lines.append(f"{stage}: the same result")
            continue
        lines.append(f"{stage}:")
        for run, manifest in zip((first, second), pair, strict=True):
            headline = manifest["metrics"].get("headline", "done") if manifest else "not run"
            lines.append(f"  {run.name}: {headline}" + (f" ({manifest['seconds']:.0f} s)" if manifest else ""))
        if pair[0] and pair[1]:
            lines += [f"    {line}" for line in _numbers(pair[0]["metrics"], pair[1]["metrics"])]
    return lines


def _numbers(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The numbers at the top of a stage's metrics, and one level below, that differ."""
    flat = [_leaves(m) for m in (first, second)]
    return [f"{k}: {flat[0][k]:.6g} | {flat[1][k]:.6g}" for k in flat[0] if k in flat[1] and flat[0][k] != flat[1][k]]


def _leaves(metrics: Mapping[str, Any], prefix: str = "", depth: int = 2) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping) and depth > 1:
            found |= _leaves(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, int | float) and "seconds" not in key:
            found[prefix + key] = value
    return found


def _merged(configs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Dotted key -> value, of the sections that several stages have read."""

    def flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(tree, Mapping) and tree:
            for key, sub in tree.items():
                yield from flat(sub, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, tree

    return {key: value for config in configs for key, value in flat(config, "") if not key.startswith("run.")}


def kept(run: Path) -> list[Path]:
    """Replaced results and unfinished work of a run, oldest first."""
    folder = run / REPLACED
    return sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime) if folder.is_dir() else []


def clean(run: Path, *, delete: bool) -> list[str]:
    """Lines on what a run keeps in `.replaced`; all of it is deleted with `delete`."""
    found = kept(run)
    if not found:
        return [f"{run}: nothing is kept"]
    lines = []
    for path in found:
        manifest = read_manifest(path)
        about = (
            f"finished {manifest['finished']}: {manifest['metrics'].get('headline', '')}" if manifest else "unfinished"
        )
        lines.append(f"{path}  {human(size_of(path))}  {about}")
    total = human(sum(map(size_of, found)))
    if delete:
        shutil.rmtree(run / REPLACED)
        return [*lines, f"deleted: {total}"]
    return [*lines, f"{total} in all; `grm clean {run} --yes` deletes it"]


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; what links point to is not counted."""
    return sum((Path(path) / name).lstat().st_size for path, _, names in os.walk(folder) for name in names)


def human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
