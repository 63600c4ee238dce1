"""`grm rm-merge OUT MODEL MODEL...`: the weights of reward models averaged into one (WARM, arXiv 2401.12187)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from core.errors import ArtefactError
from core.files import read_json
from core.training.weights import named_weights
from rm.calibration import calibrate, read_calibration
from rm.checkpoints.folder import faults, locate, read_config, shapes, types
from rm.checkpoints.layout import ABOUT_FILE, ADAPTER_FORMAT, read_about
from rm.model import RewardModel
from rm.tools.export import export

FAR = 0.5
"""Largest distance of the members from their average, relative to the length of the average. It is some hundredths for
members fine-tuned from one model, and about 1 for members that were initialised separately."""

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

NO_SETTING = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "use_cache"}
"""Entries of config.json that do not change what the weights compute."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    weights = _weights(options.weights, len(options.models))
    rows = read_calibration(options.calibrate) if options.calibrate else []
    model, facts = merge(options.models, weights)
    if rows:
        model.mean, model.std = calibrate(model, rows, batch_tokens=options.batch_tokens)
    export(model, options.out, "merged", facts=facts | {"calibrated_on": len(rows)})
    print(
        f"{options.out}: the average of {len(weights)} reward models, weighted {', '.join(f'{w:.3g}' for w in weights)}"
    )
    print(f"relative distance of the members from it: trunk {facts['distance']:.3f}, head {facts['head_distance']:.3f}")
    if facts["head_distance"] > FAR:
        print("WARM assumes heads that started from the same numbers (here: the same head seed), but these did not, so "
              "their average may be worse than each of them: compare with `grm rm-eval`")  # fmt: skip
    if rows:
        print(f"mean {model.mean:.4f} and std {model.std:.4f}, measured on {len(rows)} samples of {options.calibrate}")
    else:
        print("mean 0 and std 1 are written, because those of the members cannot be averaged: PPO and ensembles need "
              "measured ones, so give --calibrate FILE.parquet")  # fmt: skip
    return 0


def merge(paths: Sequence[str | Path], weights: Sequence[float]) -> tuple[RewardModel, dict]:
    """The reward model sum_i w_i phi_i, with mean 0 and std 1, and facts for its `reward_model.json`.

    The average over trunk, LM head and reward head is computed in float32, with one member in memory at a time, and
    stored in the type of the members. Distances in the facts are sqrt(sum_i w_i |phi_i - phi|^2) / |phi|.

    Args:
        weights: one per model, with sum 1.

    Raises:
        ArtefactError: members that differ in architecture, tokenizer, head, type or known base, or whose trunks are
            not fine-tuned from one model.
    """
    folders = [locate(path) for path in paths]
    members = [_describe(folder) for folder in folders]
    for folder, member in zip(folders[1:], members[1:], strict=True):
        _check_same(folders[0], members[0], folder, member)
    dtype = members[0]["type"]
    trunk, head = Average(), Average()
    for folder, weight in zip(folders, weights, strict=True):
        model = RewardModel.from_pretrained(folder, dtype=dtype)
        for name, tensor in named_weights(model.lm):
            trunk.add(name, tensor, weight)
        for name, tensor in model.head.state_dict().items():
            head.add(name, tensor, weight)
    if (distance := trunk.distance()) > FAR:
        raise ArtefactError(
            f"the members are {distance:.2f} times the length of their average away from it: they were not fine-tuned "
            "from one model, and the average of such weights is useless (2401.12187, section 3)"
        )
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            parameter.copy_(trunk.mean[name])
    model.head.load_state_dict(head.mean)
    model.mean, model.std = 0.0, 1.0
    facts = {
        "members": [str(path) for path in paths],
        "weights": list(weights),
        "distance": distance,
        "head_distance": head.distance(),
    }
    return model, facts


@dataclass
class Average:
    """Running weighted mean of named tensors, in float32 on the CPU, and their distance from it."""

    mean: dict[str, Tensor] = field(default_factory=dict)
    squares: float = 0.0
    """Weighted sum of squared distances from the mean, over all tensors."""
    _total: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor, weight: float) -> None:
        """West's update (1979): a tensor that equals the mean leaves it unchanged, bit for bit."""
        tensor = tensor.detach().float().cpu()
        old = self.mean.get(name, tensor)
        total = self._total.get(name, 0.0) + weight
        if total > 0:
            delta = tensor - old
            self.mean[name] = old + delta * (weight / total)
            self.squares += weight * float((delta.double() * (tensor - self.mean[name]).double()).sum())
        self._total[name] = total

    def distance(self) -> float:
        """Root of the weighted mean squared distance, relative to the length of the mean."""
        length = math.sqrt(sum(float(t.double().square().sum()) for t in self.mean.values()))
        return math.sqrt(max(self.squares, 0.0)) / length if length else math.inf


def _describe(folder: Path) -> dict:
    """What members must have in common, by name; ArtefactError if `folder` is not in the layout of this project."""
    if not (folder / ABOUT_FILE).is_file():
        raise ArtefactError(f"{folder} has another layout: convert it with `grm rm-export {folder} OUT --form merged`")
    about, config = read_about(folder), read_config(folder).to_dict()
    adapter = about["format"] == ADAPTER_FORMAT
    dtypes = types(folder)
    if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        raise ArtefactError(
            f"{folder}: weights of the types {sorted(dtypes)}; all must have one of {', '.join(DTYPES)}"
        )
    return {
        "architecture": {key: value for key, value in config.items() if key not in NO_SETTING},
        "tokenizer": about["tokenizer"],
        "head": about["head"],
        "reads": about["reads"],
        "layout": "adapter" if adapter else "merged",
        "type": DTYPES[dtypes.pop()],
        "base": f"of digest {about['base_model']['digest']}" if adapter else _base(folder),
        "tensors": {} if adapter else shapes(folder),  # adapters of different ranks can be averaged
    }


def _base(folder: Path) -> str | None:
    """The base in the manifest of the run; None if the folder is no longer in its run."""
    manifest = folder.parent / "manifest.json"
    config = read_json(manifest).get("config", {}) if manifest.is_file() else {}
    base = config.get("rm", {}).get("base", {})
    return " at ".join(filter(None, (base.get("path"), base.get("revision")))) or None


def _check_same(first: Path, a: dict, other: Path, b: dict) -> None:
    for key in ("tokenizer", "head", "reads", "layout", "type"):
        if a[key] != b[key]:
            raise ArtefactError(f"{other} does not go with {first}: {key} {b[key]}, not {a[key]}")
    if a["base"] and b["base"] and a["base"] != b["base"]:
        raise ArtefactError(f"{other} does not go with {first}: base {b['base']}, not {a['base']}")
    x, y = a["architecture"], b["architecture"]
    if differ := [f"{k} {y.get(k)!r}, not {x.get(k)!r}" for k in sorted(x.keys() | y.keys()) if x.get(k) != y.get(k)]:
        raise ArtefactError(f"{other} does not go with {first}: its {', its '.join(differ[:6])}")
    if wrong := faults(a["tensors"], b["tensors"]):
        raise ArtefactError(f"{other} does not go with {first}: {wrong}")


def _weights(text: str | None, count: int) -> list[float]:
    if count < 2:
        raise ArtefactError("give two reward models or more")
    try:
        given = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        raise ArtefactError(f"--weights {text}: write numbers separated by commas, as in 0.5,0.25,0.25") from None
    total = math.fsum(given)
    if len(given) != count or not all(w >= 0 and math.isfinite(w) for w in given) or total <= 0:
        raise ArtefactError(f"--weights {text}: give {count} numbers of 0 or more, one for each model")
    return [w / total for w in given]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grm rm-merge",
        description="Average the weights of reward models (WARM, arXiv 2401.12187). It assumes members that were "
        "fine-tuned from the same initialisation, including the reward head: train them with one head seed, but with "
        "different data orders or settings.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the new folder")
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="folders of `grm rm` or `grm rm-export --form merged`"
    )
    parser.add_argument("--weights", metavar="W,W,...", help="of the models; scaled to sum to 1 (default: equal)")
    parser.add_argument(
        "--calibrate", metavar="FILE", type=Path,
        help="calibration.parquet of a run (prompt, response): mean and std of the average are measured on it",
    )  # fmt: skip
    parser.add_argument("--batch-tokens", type=int, default=8192, help="padded tokens of a forward pass (%(default)s)")
    return parser
