"""What a stage leaves on disk: tables, manifests, atomic publication, and whether it is up to date.

A stage writes into `<stage>.partial/`; when it is done the manifest is written and the folder renamed,
so a crash never looks like success. Freshness is decided by content: the config sections that the
stage reads, the manifests of its input stages and the digests of external files.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.fields import field_of
from core.errors import ArtefactError
from core.files import count_rows, digest, file_digest, write_json
from core.machine import code_version, device_name, package_versions
from core.parts import forget
from core.row_files import Fault, parsed

MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint.json"
SEAL = "manifest_digest"
"""Key of a manifest: the digest of all else in it."""
REPLACED = ".replaced"
"""Folder of a run for results and unfinished work that another configuration took the place of."""
FAULTS = "faults"
"""Folder of a run for what `grm replay` reads (`core.training.bundles`). Nothing in it is a result."""
RESUME = "state"
"""Folder in stage `ppo` from which it can be continued; it is not among the outputs that later stages depend on."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides whether a stage must run again."""

    sections: dict[str, Any]
    """Config sections that the stage reads, as plain values."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Input stage or external file -> digest."""
    corrections: tuple[str, ...] = ()
    """What earlier versions of the stage got wrong, oldest first, and "" where it does not concern this configuration.
    A result from before one of them is out of date."""

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Which keys or inputs differ from those of a manifest, one line each.

        Corrections that are younger than the manifest come first. A field that is younger than the manifest counts as
        having had its default, and fields that cannot change a result are passed over.
        """
        # A section that the stage has stopped reading cannot make it stale.
        read = {k: v for k, v in other.get("config", {}).items() if k in self.sections}
        new, old = _flat(self.sections), _flat(read)
        lines = [
            f"{key}: {_value(old, key)} -> {_value(new, key)}"
            for key in sorted(new.keys() | old.keys())
            if new.get(key, ABSENT) != old.get(key, ABSENT)
            and _decides(key)
            and not _is_younger(key, new, old)
            and not _is_renamed_default(key, new, old)
        ]
        seen, corrected = other.get("inputs", {}), self.corrections[other.get("corrections", 0) :]
        lines = [f"an earlier version {fault}" for fault in corrected if fault] + lines
        return lines + [
            f"input {k} changed" for k in sorted(self.inputs.keys() | seen.keys()) if self.inputs.get(k) != seen.get(k)
        ]


ABSENT = object()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}
    return {prefix: tree}


def _value(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "nothing"


def _decides(key: str) -> bool:
    field = field_of(key)
    return field is None or field.decides_result


def _is_younger(key: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether `key` has its default and the manifest `old` was written before the field existed."""
    field = field_of(key)
    if field is None or key in old or new[key] != field.default:
        return False
    parts, pattern = key.split("."), field.key.split(".")
    above = [".".join(parts[:k]) for k in range(1, len(parts))]
    if any(section in old for section in above):  # it was null or empty: a value, not a section of fewer fields
        return False
    entries = [".".join(parts[: k + 1]) for k, part in enumerate(pattern) if part == "*"]
    return all(any(k.startswith(entry + ".") for k in old) for entry in entries)  # else a new entry, not a new field


def _is_renamed_default(key: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether `key` has its default, and the manifest `old` the value that was the default before."""
    field = field_of(key)
    if field is None or field.formerly is None or key not in new:
        return False
    return new[key] == field.default and old.get(key, ABSENT) == field.formerly


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a published stage; None where there is none.

    Raises:
        ArtefactError: it is not what was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = parsed(path.read_bytes())
    seal = manifest.pop(SEAL, None) if isinstance(manifest, dict) else ""
    of_earlier_version = seal is None and "outputs" in manifest
    if not of_earlier_version and seal != digest(manifest):
        fault = manifest if isinstance(manifest, Fault) else "its contents are not what was written"
        raise ArtefactError(f"{path} is damaged: {fault}; `grm {folder.name} --force` runs the stage again")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """With a digest of itself, so that damage is seen."""
    plain = json.loads(json.dumps(manifest, default=str))
    write_json(folder / MANIFEST, plain | {SEAL: digest(plain)})


def manifest_digest(manifest: dict) -> str:
    """What later stages depend on: configuration, inputs and outputs, not when or how fast it ran."""
    outputs = {o["path"]: o["sha256"] for o in manifest["outputs"]}
    return digest([manifest["stage"], manifest["config"], manifest["inputs"], outputs])


def open_partial(folder: Path, fingerprint: Fingerprint) -> Path:
    """`<folder>.partial`, kept from a killed run of the same fingerprint (so that it can resume), else empty.

    One of another fingerprint in which work was done goes to `.replaced`.
    """
    partial = partial_of(folder)
    if partial.is_dir() and not fits_partial(folder, fingerprint):
        keep_partial(folder)
    if not partial.is_dir():
        partial.mkdir(parents=True)
        write_json(partial / FINGERPRINT, as_json(fingerprint))
    return partial


def partial_of(folder: Path) -> Path:
    """Where the stage that publishes `folder` works."""
    return folder.with_name(folder.name + ".partial")


def as_json(fingerprint: Fingerprint) -> dict[str, Any]:
    facts = {
        "config": fingerprint.sections,
        "inputs": fingerprint.inputs,
        "corrections": len(fingerprint.corrections),
    }
    return json.loads(json.dumps(facts, default=str))


def read_fingerprint(partial: Path) -> dict[str, Any] | None:
    """Of an unfinished folder; None where it has none, or a damaged one."""
    path = partial / FINGERPRINT
    mark = parsed(path.read_bytes()) if path.is_file() else None
    return mark if isinstance(mark, dict) else None


def fits_partial(folder: Path, fingerprint: Fingerprint) -> bool:
    """Whether an unfinished folder can be continued under this fingerprint."""
    mark = read_fingerprint(partial_of(folder))
    return mark is not None and not fingerprint.differences(mark)


def has_work(partial: Path) -> bool:
    """Whether an unfinished folder holds more than its fingerprint."""
    return partial.is_dir() and any(p.name != FINGERPRINT for p in partial.iterdir())


def keep_partial(folder: Path) -> Path | None:
    """Move an unfinished folder to `.replaced`; where no work was done in it, delete it and return None."""
    partial = partial_of(folder)
    if not has_work(partial):
        shutil.rmtree(partial, ignore_errors=True)
        return None
    return _move(partial, kept_at(folder, f"{folder.name}.partial-{digest(read_fingerprint(partial))}"))


def kept_at(folder: Path, name: str) -> Path:
    return folder.parent / REPLACED / name


def keep_finished(folder: Path) -> Path | None:
    """Move a finished folder to `.replaced/<stage>-<digest>`, unless an equal one is there already.

    Returns:
        Where it is now; None for a link to the stage of another run, which is only removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return None
    try:
        manifest = read_manifest(folder)
    except ArtefactError:
        manifest = None
    if manifest is None:
        return _move(folder, kept_at(folder, f"{folder.name}-without-manifest"))
    target = kept_at(folder, f"{folder.name}-{manifest_digest(manifest)}")
    if target.exists():
        shutil.rmtree(target)
    return _move(folder, target)


def _move(source: Path, target: Path) -> Path:
    """Move to `target`, or to `target-2` and so on where that is taken."""
    target.parent.mkdir(exist_ok=True)
    free, number = target, 2
    while free.exists():
        free, number = target.with_name(f"{target.name}-{number}"), number + 1
    return source.rename(free)


def kept_result(folder: Path, fingerprint: Fingerprint) -> Path | None:
    """A finished result in `.replaced` that is up to date under this fingerprint."""
    for candidate in sorted(folder.parent.glob(f"{REPLACED}/{folder.name}-*")):
        try:
            manifest = read_manifest(candidate)
        except ArtefactError:
            continue
        if manifest and manifest["stage"] == folder.name and not fingerprint.differences(manifest):
            return candidate
    return None


def kept_partial(folder: Path, fingerprint: Fingerprint) -> Path | None:
    """Unfinished work in `.replaced` that can be resumed under this fingerprint; of several, the latest."""
    candidates = [
        path
        for path in folder.parent.glob(f"{REPLACED}/{folder.name}.partial-*")
        if (mark := read_fingerprint(path)) is not None and not fingerprint.differences(mark)
    ]
    return max(candidates, key=lambda path: path.stat().st_mtime, default=None)


def take_back(folder: Path, kept: Path) -> None:
    """Put a kept result in the place of the finished one, which is kept in turn."""
    if folder.exists() or folder.is_symlink():
        keep_finished(folder)
    kept.rename(folder)


def publish(
    partial: Path,
    folder: Path,
    stage: str,
    fingerprint: Fingerprint,
    *,
    seed: int,
    seconds: float,
    metrics: dict,
    parts: Mapping[str, float] | None = None,
    resumable: str | None = None,
) -> None:
    """Write the manifest and put the finished folder in place of the old one, which goes to `.replaced`.

    Args:
        seconds: that the stage took, from its command on.
        parts: some of these seconds by what they went to; `start` becomes `seconds_start`.
        resumable: a folder in `partial` that is no output: what the stage could be continued from.
    """
    forget(partial)
    outputs = [
        {
            "path": str(p.relative_to(partial)),
            "rows": count_rows(p),
            "bytes": p.stat().st_size,
            "sha256": file_digest(p),
        }
        for p in sorted(partial.rglob("*"))
        if p.is_file() and p.name not in (MANIFEST, FINGERPRINT) and p.relative_to(partial).parts[0] != resumable
    ]
    manifest = {
        "stage": stage,
        "status": "done",
        "config": fingerprint.sections,
        "config_hash": digest(fingerprint.sections),
        "inputs": fingerprint.inputs,
        "corrections": len(fingerprint.corrections),
        "outputs": outputs,
        "code": code_version(),
        "packages": package_versions(),
        "seed": seed,
        "device": device_name(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        **{f"seconds_{part}": round(spent, 1) for part, spent in (parts or {}).items()},
        "metrics": metrics,
    }
    write_manifest(partial, manifest)
    if folder.exists() or folder.is_symlink():
        keep_finished(folder)
    partial.rename(folder)
    equal = kept_at(folder, f"{folder.name}-{manifest_digest(manifest)}")
    if equal.exists():  # run again with the same result: one is enough
        shutil.rmtree(equal)
