"""What the papers' figures have in common: panels with one y axis, bands, legends below, refusals by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.errors import ArtefactError
from core.plotting import COLOURS, plt
from study.papers.read import Arm, Line, Record
from study.report.overoptimisation import below, kl_axis

GAIN = "gain, SD within prompts"
METHODS = {"bon": "best-of-n", "ppo": "PPO"}
Cell = tuple[str | None, ...]


def panels(count: int, columns: int = 3, *, width: float = 4.2, height: float = 3.4, share: bool = True):
    """A figure of `count` panels, in rows of `columns`; those of a row, or all, share their y axis."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(max(5.6, width * columns), height * lines + 0.6), squeeze=False, sharey=share
    )
    for axis in grid.flat[count:]:
        axis.set_visible(False)
    return figure, list(grid.flat[:count])


def curve(axis, line: Line, shade, stroke: str = "-", *, band: bool = False, **more) -> Line2D:
    """A curve against sqrt(KL)."""
    [handle] = axis.plot(line.d, line.mean, stroke, color=shade, **more)
    if band:
        axis.fill_between(line.d, line.lo, line.hi, color=shade, alpha=0.13, linewidth=0)
    return handle


def gold_and_proxy(axis, record: Record, arm: Arm, method: str, shade) -> Line2D | None:
    """Gold solid with its band, proxy dashed; the handle of gold, None where the arm has no curve."""
    gold, proxy = (record.of(arm, method, metric) for metric in ("gold", "proxy"))
    if gold is None:
        return None
    if proxy is not None:
        curve(axis, proxy, shade, "--")
    return curve(axis, gold, shade, band=True)


def limits(axes: Sequence) -> None:
    """One y range of all panels: that of the curves and, as far as they are not much wider, of bands."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for axis in axes for line in axis.lines])
    room = 0.5 * (float(np.ptp(values)) or 1.0)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(low, values.min() - room), min(high, values.max() + room))


def finish(figure: Figure, axes: Sequence, drawn: Mapping[str, Line2D], *, ylabel: str = GAIN) -> Figure:
    """Axes of KL, a zero line, one y range, and the legend below."""
    for axis in axes:
        axis.axhline(0, color="0.6", linewidth=0.8)
        kl_axis(axis)
    limits(axes)
    axes[0].set_ylabel(ylabel)
    keys = {"gold": Line2D([], [], color="0.3"), "proxy": Line2D([], [], color="0.3", linestyle="--")}
    below(figure, {**drawn, **keys}, 4)
    return figure


def shades(sizes: Iterable[float]) -> dict[float, tuple[float, ...]]:
    """A colour a size, small to large light to dark, all dark enough to be seen on white."""
    ordered = sorted(set(sizes))
    scale = plt.get_cmap("viridis")
    at = np.linspace(0.8, 0.0, len(ordered)) if len(ordered) > 1 else [0.3]
    return {size: scale(float(a)) for size, a in zip(ordered, at, strict=True)}


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour a name."""
    return {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(dict.fromkeys(names))}


def cell(arm: Arm, *keys: str) -> Cell:
    """What an arm is beside what a figure varies: its sizes and noise in words, None for what is not known."""
    facts = arm.facts
    words = {
        "variant": arm.variant,
        "pairs": f"{facts['pairs']:g} pairs" if facts.get("pairs") else None,
        "layers": f"{facts['layers']:g} layers" if facts.get("layers") else None,
        "label_noise": f"{facts['label_noise']:.0%} wrong labels" if facts.get("label_noise") else None,
        "kl_coef": f"KL coefficient {arm.kl_coef:g}" if arm.kl_coef else None,
    }
    return tuple(words[key] for key in keys)


def title(one: Cell) -> str:
    return ", ".join(filter(None, one))


def grouped(arms: Iterable[Arm], *keys: str) -> dict[Cell, list[Arm]]:
    """Arms without a rule, by what they have in common."""
    found: dict[Cell, list[Arm]] = {}
    for arm in arms:
        if arm.rule is None:
            found.setdefault(cell(arm, *keys), []).append(arm)
    return found


def millions(size: float) -> str:
    """Parameters as 135M; a number of layers as it is."""
    return f"{size / 1e6:.3g}M" if size >= 1e5 else f"{size:g} layers"


def refuse(name: str, record: Record, lacks: str, remedy: str) -> ArtefactError:
    """The error of a figure that a study has not the numbers for."""
    return ArtefactError(f"figure {name}: {record.folder} has {lacks}: {remedy}")
