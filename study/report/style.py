"""What marks a condition in every figure of a study. Colours are safe for the colour-blind and mean one condition
everywhere; with more conditions than colours they mean a method, and a marker the sizes and the noise."""

from __future__ import annotations

from matplotlib.lines import Line2D

from core.plotting import COLOURS
from study.records import Results

MARKERS = "osD^vPX<>*hpd8"


def colour(found: Results, name: str, *, alone: bool = False) -> str:
    """One a condition, or a method where there are more conditions than colours (`alone`: a condition even then); a
    policy or ensemble has that of its condition."""
    base = max((c for c in found.conditions if name.startswith(c)), key=len, default=None)
    if base is None:
        return "0.45"
    if crowded(found) and not alone:
        methods = list(dict.fromkeys(found.found[c]["method"] for c in found.conditions))
        return COLOURS[methods.index(found.found[base]["method"]) % len(COLOURS)]
    return COLOURS[list(found.conditions).index(base) % len(COLOURS)]


def crowded(found: Results) -> bool:
    """Whether there are more conditions than colours."""
    return len(found.conditions) > len(COLOURS)


def cells(found: Results) -> list[tuple]:
    """The sizes and noises of the matrix: what conditions of one method differ in."""
    return list(dict.fromkeys(cell(found, c) for c in found.conditions))


def cell(found: Results, condition: str) -> tuple:
    return tuple(found.found[condition][k] for k in ("pairs", "layers", "label_noise"))


def style(found: Results, name: str) -> dict:
    """Colour, and a marker where colour does not tell conditions apart."""
    marked = crowded(found) and name in found.conditions
    marker = MARKERS[cells(found).index(cell(found, name)) % len(MARKERS)] if marked else None
    return {"color": colour(found, name), "marker": marker, "markevery": 0.12, "markersize": 4}


def legend(axis, found: Results) -> None:
    """Inside where it is short, else beside the axes, so that no entry lies on a line. With more conditions than
    colours it tells methods by colour and what else they differ in by marker, each once."""
    drawn = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if crowded(found):
        rest = {name: line for name, line in drawn.items() if name not in found.conditions}
        methods = {found.found[c]["method"]: colour(found, c) for c in found.conditions}
        drawn = {name: Line2D([], [], color=shade) for name, shade in methods.items()}
        for number, one in enumerate(cells(found)):
            drawn[cell_name(one)] = Line2D([], [], color="0.4", marker=MARKERS[number % len(MARKERS)], linestyle="")
        drawn |= rest
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0} if len(drawn) > 5 else {}
    axis.legend(drawn.values(), drawn.keys(), fontsize=8, **beside)


def cell_name(one: tuple) -> str:
    """A cell of the matrix in words."""
    pairs, layers, noise = one
    parts = [f"{pairs} pairs"] * bool(pairs) + [f"{layers} layers"] * bool(layers) + [f"noise {noise:g}"] * bool(noise)
    return ", ".join(parts) or "all pairs"
