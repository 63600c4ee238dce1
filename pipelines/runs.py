"""Runs as a whole: stages taken from another run, what there is, what differs, what is kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.artefacts import (
    FAULTS,
    FINGERPRINT,
    MANIFEST,
    REPLACED,
    Fingerprint,
    has_work,
    keep_finished,
    kept_result,
    partial_of,
    read_manifest,
    take_back,
)
from core.config import Config
from core.config.fields import REQUIRED, field_of
from core.damage import OWN, look
from core.errors import ArtefactError
from pipelines.inputs import check
from pipelines.stages import STAGES, fingerprint, in_use, say, staleness

STATUS_BYTES = 10**9
"""`grm status` reads files of at most so many bytes a stage, where nothing is remembered of them."""


def needed_by(name: str, cfg: Config) -> list[str]:
    """The stages that `name` reads, directly or through others, and itself, in the order of the table."""
    wanted = {name}
    for stage in reversed(STAGES.values()):
        if stage.name in wanted:
            wanted |= set(stage.inputs_in(cfg))
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
        ArtefactError: an input is missing or out of date; or the files of the result are not what was written.
    """
    folder = cfg.run_dir / name
    if staleness(name, cfg) == []:
        check(name, folder, f"{name}: up to date, but")
        say(f"{name}: up to date")
        return True
    wanted = fingerprint(STAGES[name], cfg)
    if kept := kept_result(folder, wanted):
        check(name, kept, f"{name}: was kept, but")
        take_back(folder, kept)
        say(f"{name}: up to date again, with the result that was kept in {kept}")
        return True
    if source is not None and fits(source / name, wanted):
        check(name, source / name, f"{name}: fits, but")
        if folder.exists() or folder.is_symlink():  # a link may lead nowhere
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


def plan(name: str, cfg: Config, source: Path, *, force: bool = False) -> list[tuple[str, str]]:
    """(stage, what will be done with it) of all that `name` needs, from content alone; nothing is changed.

    Args:
        force: `name` itself runs in any case.
    """
    steps: list[tuple[str, str]] = []
    settled: dict[str, Path] = {}
    for stage in needed_by(name, cfg):
        if changed := [i for i in STAGES[stage].inputs_in(cfg) if i not in settled]:
            steps.append((stage, f"will run, because {' and '.join(changed)} will be re-run"))
            continue
        if force and stage == name:
            steps.append((stage, "will run, because of --force"))
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


def status(cfg: Config) -> list[str]:
    """One line a stage: its state and headline."""
    lines = []
    for name in in_use(cfg):
        try:
            manifest = read_manifest(cfg.run_dir / name)
        except ArtefactError as error:
            lines.append(f"{name:<12} damaged: {error}")
            continue
        headline = manifest["metrics"].get("headline", "") if manifest else STAGES[name].makes
        lines.append(f"{name:<12} {_state(name, cfg, manifest):<12} {headline}")
    return lines


def _state(name: str, cfg: Config, manifest: dict | None) -> str:
    """Of a stage: not run, up to date, stale, damaged, or waits."""
    try:
        changed = staleness(name, cfg)
    except ArtefactError as error:
        return f"waits: {error}" if manifest is None else f"stale: {error}"
    if manifest is None or changed is None:
        return "not run"
    if changed:
        return f"stale: {changed[0]}"
    faults, unread = look(cfg.run_dir / name, manifest, most_bytes=STATUS_BYTES)
    if faults:
        return f"damaged: {faults[0]}" + (f", and {len(faults) - 1} more" if len(faults) > 1 else "")
    return "up to date" + (f" ({human(unread)} not read since they came here: `grm verify`)" if unread else "")


def find_runs(folder: Path) -> Iterator[Path]:
    """Folders with a finished or unfinished stage in them, at any depth, links not followed."""
    marks = [f"{stage}/{MANIFEST}" for stage in STAGES] + [f"{stage}.partial/{FINGERPRINT}" for stage in STAGES]
    for path, folders, _ in os.walk(folder):
        here = Path(path)
        if any((here / mark).is_file() for mark in marks):
            yield here
        folders[:] = sorted(
            f for f in folders
            if f not in (*STAGES, REPLACED, OWN) and not f.endswith(".partial") and not (here / f).is_symlink()
        )  # fmt: skip


def list_runs(folder: Path) -> list[str]:
    """One block of lines a run: name, size, minutes, stages, and the headlines of the stages that it ran itself.

    Sizes and times are without linked stages and without runs in folders below, which have a block of their own.
    """
    lines, found = [], list(find_runs(folder))
    for run in found:
        read = {s: _manifest_or_fault(run / s) for s in STAGES}
        manifests = {s: m for s, m in read.items() if isinstance(m, dict)}
        own = {s: m for s, m in manifests.items() if not (run / s).is_symlink()}
        stages = [s + ("" if s in own else " (linked)") for s in manifests]
        stages += [f"{s} (unfinished)" for s in STAGES if has_work(partial_of(run / s))]
        size = human(size_of(run, without=found))
        minutes = sum(m["seconds"] for m in own.values()) / 60
        lines.append(f"{run.relative_to(folder)}  {size}  {minutes:.1f} min  {', '.join(stages)}")
        if held := kept(run):
            lines[-1] += f"; {human(sum(map(size_of, held)))} of it kept aside (`grm clean`)"
        lines += [f"    {s:<12} {m['metrics'].get('headline', '')}" for s, m in own.items() if s != "report"]
        lines += [f"    {s:<12} damaged: {fault}" for s, fault in read.items() if isinstance(fault, str)]
    return lines or [f"no run in {folder}"]


def _manifest_or_fault(folder: Path) -> dict | str | None:
    """The manifest of a stage, or what is wrong with it: one that is damaged must not hide all others."""
    try:
        return read_manifest(folder)
    except ArtefactError as error:
        return str(error)


def diff(first: Path, second: Path) -> list[str]:
    """What differs in the configurations of two runs, and the headlines and numbers of their stages."""
    runs = [{s: m for s in STAGES if (m := read_manifest(run / s))} for run in (first, second)]
    for run, manifests in zip((first, second), runs, strict=True):
        if not manifests:
            raise ArtefactError(f"{run}: no finished stage in that folder; `grm runs` lists the runs")
    lines = [f"configuration of {first} and {second}, of the stages that both have:"]
    lines += [f"  {line}" for line in _config_lines(runs)] or ["  the same"]
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


def _config_lines(runs: list[dict[str, dict]]) -> list[str]:
    """The keys that differ in the stages that both runs have."""
    both = [stage for stage in STAGES if all(stage in manifests for manifests in runs)]
    flat = [dict(_leaves([manifests[stage]["config"] for stage in both])) for manifests in runs]
    lines = []
    for key in sorted((flat[0].keys() | flat[1].keys()) - {"run.name", "run.dir"}):
        values = [_value(side, key) for side in flat]
        if values[0] != values[1]:
            lines.append(f"{key}: {values[0]} | {values[1]}")
    return lines


def _value(flat: Mapping[str, Any], key: str) -> str:
    """The value as JSON. Where a manifest is older than the field, the field had its default."""
    field, section = field_of(key), key.rpartition(".")[0] + "."
    if key in flat:
        return json.dumps(flat[key], ensure_ascii=False)
    if any(other.startswith(key + ".") for other in flat):
        return "a section"
    if field and field.default is not REQUIRED and any(other.startswith(section) for other in flat):
        return json.dumps(field.default, ensure_ascii=False)
    return "not set"


def _numbers(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The numbers of a stage that differ, without intervals, times, and the first of a series of steps."""
    flat = [{k: v for k, v in _leaves([m]) if isinstance(v, int | float) and _is_main(k)} for m in (first, second)]
    return [f"{k}: {flat[0][k]:.6g} | {flat[1][k]:.6g}" for k in flat[0] if k in flat[1] and flat[0][k] != flat[1][k]]


def _is_main(key: str) -> bool:
    parts = key.split(".")
    return parts[0] != "first" and parts[-1] not in ("lo", "hi", "se", "n") and "second" not in parts[-1]


def _leaves(trees: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in mappings in mappings."""
    for tree in trees:
        if isinstance(tree, Mapping) and tree:
            for key, below in tree.items():
                yield from _leaves([below], f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, tree


def kept(run: Path) -> list[Path]:
    """Replaced results, unfinished work, and bundles for `grm replay` of a run, oldest first."""
    folders = [run / name for name in (REPLACED, FAULTS) if (run / name).is_dir()]
    return sorted((path for folder in folders for path in folder.iterdir()), key=lambda p: p.stat().st_mtime)


def clean(folder: Path, *, delete: bool) -> list[str]:
    """Lines on what a run, and the runs in folders below it, keep (`kept`); with `delete` all of it is deleted.

    Raises:
        ArtefactError: there is no such folder.
    """
    if not folder.is_dir():
        raise ArtefactError(f"no run {folder}; `grm runs` lists the runs")
    found = [path for run in dict.fromkeys([folder, *find_runs(folder)]) for path in kept(run)]
    if not found:
        return [f"{folder}: nothing is kept"]
    lines = []
    for path in found:
        manifest = _manifest_or_fault(path)
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        about = manifest["metrics"].get("headline", "finished") if isinstance(manifest, dict) else "unfinished"
        about = "damaged" if isinstance(manifest, str) else "for grm replay" if path.parent.name == FAULTS else about
        lines.append(f"{path}  {human(size_of(path))}  {date}  {about}")
    total = human(sum(map(size_of, found)))
    if not delete:
        return [*lines, f"{total} in all; `grm clean {folder} --yes` deletes it"]
    for path in found:
        shutil.rmtree(path)
    return [*lines, f"deleted: {total}"]


def size_of(folder: Path, without: Collection[Path] = ()) -> int:
    """Bytes of the files below a folder; what links point to is not counted, nor what is below other folders."""
    size = 0
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(path, name) not in without]
        size += sum(Path(path, name).lstat().st_size for name in names)
    return size


def human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
