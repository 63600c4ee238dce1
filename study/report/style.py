"""What marks a condition in every figure of a study. Colours are safe for the colour-blind and mean one condition
everywhere; with more conditions than colours they mean a variant, and a marker the sizes and the noise."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.lines import Line2D

from core.plotting import COLOURS
from study.analysis.conditions import Curve
from study.records import Results
from study.report.words import of_cell

MARKERS = "osD^vPX<>*hpd8"


def colour(results: Results, name: str, *, alone: bool = False) -> str:
    """One a condition, or a variant where there are more conditions than colours (`alone`: a condition even then); a
    policy or ensemble has that of its condition."""
    base = results.condition_of(name)
    if base not in results.conditions:
        return "0.45"
    if crowded(results) and not alone:
        variants = list(dict.fromkeys(results.designs[c].variant for c in results.conditions))
        return COLOURS[variants.index(results.designs[base].variant) % len(COLOURS)]
    return COLOURS[list(results.conditions).index(base) % len(COLOURS)]


def crowded(results: Results) -> bool:
    """Whether there are more conditions than colours."""
    return len(results.conditions) > len(COLOURS)


def cells(results: Results) -> list[tuple]:
    """The sizes and noises of the matrix: what conditions of one variant differ in."""
    return list(dict.fromkeys(cell(results, c) for c in results.conditions))


def cell(results: Results, condition: str) -> tuple:
    return results.designs[condition].cell


def style(results: Results, name: str) -> dict:
    """Colour, and a marker where colour is not enough."""
    marked = crowded(results) and name in results.conditions
    marker = MARKERS[cells(results).index(cell(results, name)) % len(MARKERS)] if marked else None
    return {"color": colour(results, name), "marker": marker, "markevery": 0.12, "markersize": 4}


def pick(results: Results, method: str, metric: str, names: Sequence[str] | None = None) -> list[Curve]:
    """Curves of some names, by default of all conditions; of all policies by default where the method is ppo."""
    wanted = results.conditions if names is None else names
    return [
        c for c in results.curves
        if c.method == method and c.metric == metric and ((method == "ppo" and names is None) or c.rm in wanted)
    ]  # fmt: skip


def legend(axis, results: Results) -> None:
    """Beside the axes, so that no entry lies on a line. With more conditions than colours, colour stands for the
    variant and the marker for the rest; each is listed once."""
    drawn = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if crowded(results):
        rest = {name: line for name, line in drawn.items() if name not in results.conditions}
        variants = {results.designs[c].variant: colour(results, c) for c in results.conditions}
        drawn = {name: Line2D([], [], color=shade) for name, shade in variants.items()}
        for number, one in enumerate(cells(results)):
            drawn[of_cell(one)] = Line2D([], [], color="0.4", marker=MARKERS[number % len(MARKERS)], linestyle="")
        drawn |= rest
    axis.legend(drawn.values(), drawn.keys(), fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
