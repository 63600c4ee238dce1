"""What a study has written, as the papers' figures need it: curves, fits and facts by condition.

A study is read from its tables, so a figure needs no model and no pools, and takes a second.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ArtefactError
from core.files import read_json

FOLDERS = ("", "study", "report")
"""Below a run, where the tables may be; a study's before those of a report."""
SIZES = ("layers", "params", "pairs", "label_noise", "val_loss_nats", "accuracy_gold")
"""Columns of `--design`, beside `rm`."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    x: NDArray[np.float64]
    kl: NDArray[np.float64]
    mean: NDArray[np.float64]
    lo: NDArray[np.float64]
    hi: NDArray[np.float64]
    """Of the simultaneous band."""

    @property
    def d(self) -> NDArray[np.float64]:
        return np.sqrt(np.maximum(self.kl, 0))


@dataclass(frozen=True)
class Arm:
    """A condition or ensemble under best-of-n, or the policies of one; with what is known of it."""

    name: str
    facts: dict[str, Any]
    """Its row of conditions.json or pooled.json, with variant, rule, pairs, layers and label_noise of its design."""
    params: float | None
    runs: tuple[str, ...]
    """Names of its policies; its own under best-of-n."""
    pooled: bool

    @property
    def variant(self) -> str:
        return str(self.facts.get("variant") or self.name)

    @property
    def rule(self) -> str | None:
        return self.facts.get("rule")

    @property
    def kl_coef(self) -> float | None:
        return self.facts.get("kl_coef")

    @property
    def size(self) -> float:
        """Parameters, or layers where those are not known; 0 where neither is."""
        return float(self.params or self.facts.get("layers") or 0)

    def fit(self, name: str) -> tuple[float, float, float] | None:
        """alpha or beta with its interval."""
        fit = self.facts.get("fit")
        return (fit[name]["mean"], fit[name]["lo"], fit[name]["hi"]) if fit else None


@dataclass
class Record:
    """One study."""

    folder: Path
    bon: list[Arm]
    ppo: list[Arm]
    rms: list[dict]
    members: list[dict]
    """Rows of ensemble_size.csv."""
    about: dict[str, Any]
    rows: dict[tuple[str, str, str], list[dict]] = field(repr=False)

    def line(self, method: str, metric: str, name: str) -> Line | None:
        """A curve of curves.csv in the order of its KL."""
        rows = sorted(self.rows.get((method, metric, name), []), key=lambda r: float(r["kl"]))
        column = lambda key: np.array([float(r[key]) for r in rows])  # noqa: E731
        return Line(*map(column, ("x", "kl", "mean", "band_lo", "band_hi"))) if rows else None

    def arms(self, method: str) -> list[Arm]:
        return self.bon if method == "bon" else self.ppo

    def of(self, arm: Arm, method: str, metric: str) -> Line | None:
        """The curve of an arm: pooled over its seeds where policies have several."""
        if method == "bon":
            return self.line("bon", metric, arm.name)
        return self.line("ppo_pooled", metric, arm.name) if arm.pooled else self.line("ppo", metric, arm.runs[0])


def read(given: str | Path, design: Path | None = None) -> Record:
    """The tables of a run's name or folder, or of a folder of `grm study --scores`.

    Args:
        design: a CSV of `rm` (a condition's name) and what is known of it: sizes, pairs, noise, losses.

    Raises:
        ArtefactError: no such folder, or none with the tables of a study.
    """
    roots = [Path(given), Path("runs") / given]
    places = [root / folder for root in roots for folder in FOLDERS]
    folder = next((p for p in places if (p / "curves.csv").is_file()), None)
    if folder is None:
        raise ArtefactError(
            f"{given}: no curves.csv there, nor in study/ or report/ below it or below runs/{given}: run `grm study` "
            "or `grm report` first, or `grm study --scores FILE --out FOLDER` for scores of other tools"
        )
    known = _design(design) if design else {}
    rms = [{**r, **known.get(str(r["condition"]), {})} for r in _json(folder / "rms.json", [])]
    conditions = {n: {**f, **known.get(n, {})} for n, f in _json(folder / "conditions.json", {}).items()}
    pooled = _json(folder / "pooled.json", {"pooled": {}})["pooled"]
    params = _parameters(rms) | {n: f["params"] for n, f in known.items() if "params" in f}
    bon = [Arm(n, f, params.get(f.get("members", n)), (n,), False) for n, f in conditions.items()]
    ppo = [
        Arm(n, {**f, **known.get(f["condition"], {})}, params.get(f["members"]), tuple(f["policies"]), f["seeds"] > 1)
        for n, f in pooled.items()
    ]
    rows: dict[tuple[str, str, str], list[dict]] = {}
    for row in _csv(folder / "curves.csv"):
        rows.setdefault((row["method"], row["metric"], row["rm"]), []).append(row)
    members = _csv(folder / "ensemble_size.csv") if (folder / "ensemble_size.csv").is_file() else []
    return Record(folder, bon, ppo, rms, members, _json(folder / "about.json", {}), rows)


def _parameters(rms: Sequence[Mapping]) -> dict[str, float]:
    """Condition -> parameters of its reward models."""
    return {str(r["condition"]): float(r["params"]) for r in rms if r.get("params")}


def _design(file: Path) -> dict[str, dict[str, float]]:
    rows = _csv(file)
    if "rm" not in rows[0] or not set(SIZES) & rows[0].keys():
        raise ArtefactError(f"--design {file}: a row is `rm` (a condition's name) and some of {', '.join(SIZES)}")
    return {row["rm"]: {k: float(row[k]) for k in SIZES if row.get(k)} for row in rows}


def _csv(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise ArtefactError(f"no file {file}")
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _json(file: Path, default: Any) -> Any:
    try:
        return read_json(file) if file.is_file() else default
    except json.JSONDecodeError as error:
        raise ArtefactError(f"{file}: {error}") from None
