"""Bundles: what a computation read that gave NaN or infinite numbers, so that `grm replay` can run it again.

A bundle is a folder in `faults/` of the run, with a JSON file that says what was computed and two files of tensors: the
inputs, and those weights that were trained. Other weights are read where the run has read them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.artefacts import FAULTS
from core.errors import ArtefactError
from core.files import digest, open_tensors, read_json, write_json
from core.training import distributed
from core.training.distributed import NotFinite
from core.training.weights import trained_weights

ABOUT, INPUTS, WEIGHTS = "bundle.json", "inputs.safetensors", "weights.safetensors"
SEAL = "digest"
"""Key in `ABOUT`: the digest of all else in it."""


@dataclass(frozen=True)
class Bundle:
    about: dict[str, Any]
    """`stage`, `phase`, `said` (the error), `name`, `rank`, `prompts`, and what the phase needs besides."""
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    """Names within their module, as they were when the computation began."""


def faults_folder(out: Path) -> Path:
    """Where the bundles of a stage go that writes into `out` or a folder above it: into the folder of its run."""
    partial = next((folder for folder in (out, *out.parents) if folder.name.endswith(".partial")), out)
    return partial.parent / FAULTS


def save_bundle(
    fault: NotFinite, folder: Path, about: Mapping[str, Any], inputs: Mapping[str, Tensor], module: nn.Module | None
) -> NotFinite:
    """Write a bundle; the fault with a message that names it.

    Every rank must call it, with the same arguments. The rank with the fault writes, since its weights may be others
    where memory has failed.

    Args:
        folder: of the bundle; one that is there is replaced.
        module: whose trained weights are kept.
    """
    weights = trained_weights(module, fault.rank) if module else {}
    said = f"`grm replay {folder}` runs that computation again"
    if distributed.rank() == fault.rank:
        try:
            _write(folder, {**about, "said": str(fault), "name": fault.name, "rank": fault.rank,
                            "prompts": fault.prompts}, inputs, weights)  # fmt: skip
        except OSError as error:  # the run stops for a better reason
            said = f"no bundle could be written for `grm replay` ({error})"
    fault.args = (f"{fault}. {said}",)
    return fault


def _write(folder: Path, about: dict[str, Any], inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in inputs.items()}, partial / INPUTS)
    save_file(dict(weights), partial / WEIGHTS)
    write_json(partial / ABOUT, {**about, SEAL: digest(about)})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_bundle(folder: Path) -> Bundle:
    """The bundle in a folder.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    if not (folder / ABOUT).is_file():
        raise ArtefactError(f"no bundle in {folder}: the message of the run that stopped names its folder")
    about = read_json(folder / ABOUT)
    if not isinstance(about, dict) or about.pop(SEAL, None) != digest(about):
        raise ArtefactError(f"{folder / ABOUT} is damaged: it is not what was written")
    return Bundle(about, _tensors(folder / INPUTS), _tensors(folder / WEIGHTS))


def _tensors(file: Path) -> dict[str, Tensor]:
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def put_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module, made as in the run, the weights of a bundle.

    Raises:
        ArtefactError: it has other weights.
    """
    own = dict(module.named_parameters())
    if wrong := [n for n, w in weights.items() if n not in own or own[n].shape != w.shape]:
        raise ArtefactError(
            f"the model has no weight {wrong[0]} of this shape: is the base model the one that the run has read?"
        )
    module.load_state_dict(dict(weights), strict=False)
