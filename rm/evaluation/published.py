"""Published reward models beside the scores that their makers published: `grm rm-eval --published FILE`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config.load import read_yaml
from core.errors import ArtefactError, DataError
from rm.checkpoints.folder import locate

SCORE = "score"


@dataclass(frozen=True, slots=True)
class Published:
    """What a file such as configs/published.yaml says; scores are in percent."""

    scores: dict[str, dict[str, float]]
    """Folder or hub id -> `score` and parts of it, by the names that the benchmark has for them."""
    tolerance: float
    """Of `score`, in percentage points."""
    parts_tolerance: float
    """Of the parts."""

    def tolerance_of(self, part: str) -> float:
        return self.tolerance if part == SCORE else self.parts_tolerance


@dataclass(frozen=True, slots=True)
class Line:
    """One number of one model."""

    model: str
    part: str
    published: float
    measured: float | None
    """In percent; None where the set lacks something that the benchmark has, or knows no such part."""
    tolerance: float

    @property
    def fits(self) -> bool:
        # The published number is a decimal one: a difference of exactly the tolerance fits.
        return self.measured is not None and abs(self.measured - self.published) <= self.tolerance + 1e-9


def read_published(file: Path) -> Published:
    """The models and scores of a file.

    Raises:
        ConfigError: it is no YAML file with sections.
        DataError: a section, a score or a tolerance is missing or no percentage; names it.
    """
    tree = read_yaml(file)
    if unknown := sorted(set(tree) - {"tolerance", "models"}):
        raise DataError(f"{file}: {unknown[0]}: no such section; there are tolerance and models")
    models = tree.get("models")
    if not isinstance(models, dict) or not models:
        raise DataError(f"{file}: models must be a mapping of hub ids (or folders) to scores in percent")
    scores = {str(model): _percentages(file, f"models.{model}", given) for model, given in models.items()}
    if missing := [model for model, given in scores.items() if SCORE not in given]:
        raise DataError(f"{file}: models.{missing[0]} has no `score`")
    tolerance = _percentages(file, "tolerance", tree.get("tolerance"))
    if set(tolerance) != {SCORE, "parts"}:
        raise DataError(f"{file}: tolerance must be {{score: POINTS, parts: POINTS}}, in percentage points")
    return Published(scores, tolerance[SCORE], tolerance["parts"])


def _percentages(file: Path, key: str, given: Any) -> dict[str, float]:
    if not isinstance(given, dict) or not given:
        raise DataError(f"{file}: {key} must be a mapping of names to percentages")
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not 0 <= value <= 100:
            raise DataError(f"{file}: {key}.{name} is {value!r}, not a percentage between 0 and 100")
    return {str(name): float(value) for name, value in given.items()}


def chosen(published: Published, file: Path, models: Sequence[str], *, sets: int) -> list[str]:
    """The models to score: those that are given, else all of the file.

    Args:
        sets: how many evaluation sets are given.

    Raises:
        DataError: a model that is not in the file, or several sets: published scores are those of one benchmark.
    """
    if sets != 1:
        raise DataError("--published compares the scores of one benchmark: give --set once")
    if absent := [model for model in models if model not in published.scores]:
        raise DataError(f"{absent[0]} is none of the models of {file}: {', '.join(published.scores)}")
    return list(models or published.scores)


def fetch(models: Sequence[str]) -> None:
    """Have every model here before the first one is scored.

    Raises:
        ArtefactError: names each that is neither a folder nor to be had from the hub.
    """
    faults = []
    for model in models:
        try:
            locate(model)
        except ArtefactError as error:
            faults.append(str(error))
    if faults:
        raise ArtefactError("\n  ".join([f"{len(faults)} of {len(models)} models are not to be had:", *faults]))


def compare(published: Published, model: str, benchmark: Mapping[str, Any] | None) -> list[Line]:
    """The model's numbers beside the published ones.

    Args:
        benchmark: what `rm.evaluation.benchmark_scores.benchmark_score` gives; None for a set that defines no score.
    """
    own = benchmark or {"missing": []}
    measured = {SCORE: own.get("score"), **own.get("parts", {})}
    whole = not own["missing"]
    return [
        Line(model, part, score, 100 * measured[part] if whole and measured.get(part) is not None else None,
             published.tolerance_of(part))
        for part, score in published.scores[model].items()
    ]  # fmt: skip


def rows(lines: Sequence[Line]) -> list[list[str]]:
    """Cells of a table: model, part, published, measured, difference, tolerance, outcome."""
    return [
        [
            line.model, line.part, f"{line.published:.1f}",
            "-" if line.measured is None else f"{line.measured:.1f}",
            "-" if line.measured is None else f"{line.measured - line.published:+.1f}",
            f"{line.tolerance:.1f}", "fits" if line.fits else "DIFFERS",
        ]
        for line in lines
    ]  # fmt: skip


HEADER = ["model", "part", "published", "measured", "difference", "tolerance", ""]


def verdict(lines: Sequence[Line]) -> str:
    """One sentence: all fit, or which models do not and in what."""
    models = list(dict.fromkeys(line.model for line in lines))
    wrong = {model: [line for line in lines if line.model == model and not line.fits] for model in models}
    named = [f"{model} ({', '.join(line.part for line in found)})" for model, found in wrong.items() if found]
    if not named:
        return f"all {len(models)} models have their published scores, within the tolerance"
    return f"{len(named)} of {len(models)} models do not have their published scores: {'; '.join(named)}"
