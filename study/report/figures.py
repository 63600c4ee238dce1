"""Figures of a study (those that compare arms: `study_figures_arms`). Gold is solid, proxy
dashed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from core.plotting import plt
from study.analysis.conditions import prompt_gains
from study.records import Results
from study.report import comparisons as arms
from study.report.style import MARKERS, cell, cell_name, cells, colour, crowded, legend, style

UNIT = "gain over the reference, SD within prompts"


def all_figures(results: Results) -> dict[str, Figure]:
    """Name -> figure; those without data are left out. The main one comes first."""
    if not results.conditions:  # policies of other tools, without pools
        figures = {"overoptimisation": overoptimisation(results), "gold_against_proxy": gold_against_proxy(results),
                   "frontier": arms.frontier(results)}  # fmt: skip
        return {name: figure for name, figure in figures.items() if figure is not None}
    drawn = {
        "overoptimisation": overoptimisation(results),
        "conditions": conditions(results),
        "gold_against_proxy": gold_against_proxy(results),
        "gold_by_proxy": gold_by_proxy(results),
        "win_rate": win_rate(results),
        "length": length(results),
        "harm": harm(results),
        "scaling": arms.scaling(results),
        "heat_map": arms.heat_map(results),
        "frontier": arms.frontier(results),
        "sweep": arms.sweep(results),
        "disagreement": arms.disagreement(results),
        "prediction": arms.prediction(results),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _curves(results: Results, method: str, metric: str, names: Sequence[str] | None = None) -> list:
    wanted = results.conditions if names is None else names
    return [
        c for c in results.curves if c.method == method and c.metric == metric and (method == "ppo" or c.rm in wanted)
    ]


def overoptimisation(results: Results) -> Figure:
    """Gold and proxy, in one unit, against sqrt(KL), with 95% simultaneous bands of gold: best-of-n in a panel, or in
    one a size and noise where there are more conditions than colours, and PPO in the last."""
    policies = _curves(results, "ppo", "gold")
    groups = [[c for c in results.conditions if cell(results, c) == one] for one in cells(results)]
    groups = groups if crowded(results) or not groups else [list(results.conditions)]
    count, single = len(groups) + bool(policies), len(groups) == 1
    columns = min(count, 2 if single else 4)
    lines = -(-count // columns)
    size = (11 if columns > 1 else 7, 4.6 if single else 2.8 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False)
    panels = list(grid.flat)
    for axis, names in zip(panels, groups, strict=False):
        title = "Best-of-n (KL: log n - (n-1)/n, an upper bound)" if single else cell_name(cell(results, names[0]))
        _best_of_n(axis, results, names, title)
    if policies:
        _policies(panels[len(groups)], results)
    for axis in panels[count:]:
        axis.set_visible(False)
    for number, axis in enumerate(panels[:count]):
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xlabel("sqrt(KL from the reference), nats$^{1/2}$" if single else "sqrt(KL)")
        if single or number == 0:
            axis.legend(fontsize=8, loc="upper left")
        elif number == len(groups):
            axis.legend(fontsize=6, loc="upper left")
    for row in grid:
        row[0].set_ylabel(UNIT if single else "gain, SD within prompts")
    return figure


def _best_of_n(axis, results: Results, names: Sequence[str], title: str) -> None:
    for metric, line in (("gold", "-"), ("proxy", "--")):
        for curve in _curves(results, "bon", metric, names):
            shade = colour(results, curve.rm)
            name = results.designs[curve.rm].variant if crowded(results) else curve.rm
            axis.plot(curve.d, curve.mean, line, color=shade, label=name if metric == "gold" else None)
            if metric == "gold":
                axis.fill_between(curve.d, *_band(curve.rows()), color=shade, alpha=0.15, linewidth=0)
    best = _curves(results, "bon", "gold", ["oracle"])[0]
    axis.plot(best.d, best.mean, ":", color="0.3", label="oracle")
    axis.set_title(title, fontsize=8 if crowded(results) else 10)
    _n_axis(axis, best)


def _policies(axis, results: Results) -> None:
    for metric, line in (("gold", "-"), ("proxy", "--")):
        for number, curve in enumerate(_curves(results, "ppo", metric)):
            order, shade = np.argsort(curve.d), colour(results, curve.rm)
            label = curve.rm if metric == "gold" else None
            marker = MARKERS[number % len(MARKERS)]
            axis.plot(curve.d[order], curve.mean[order], line, color=shade, marker=marker, markersize=4, label=label)
            if metric == "gold":
                lo, hi = _band(curve.rows())
                axis.fill_between(curve.d[order], lo[order], hi[order], color=shade, alpha=0.15, linewidth=0)
    bounds = all(curve.kl_kind == "bound" for curve in _curves(results, "ppo", "gold"))
    title = "Best of the first n (KL: an upper bound)" if bounds else "PPO (KL: measured on samples)"
    axis.set_title(title, fontsize=8 if crowded(results) else 10, pad=16)


def _band(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r["band_lo"] for r in rows]), np.array([r["band_hi"] for r in rows])


def _n_axis(axis, curve) -> None:
    """n above, where KL is below."""
    ticks = [k for k in range(len(curve.x)) if np.log2(curve.x[k]) % 1 == 0]
    top = axis.secondary_xaxis("top")
    top.set_xticks([curve.d[k] for k in ticks], [f"{int(curve.x[k])}" for k in ticks], fontsize=7)
    top.tick_params(length=2)
    axis.set_title(axis.get_title(), pad=16, fontsize=axis.title.get_fontsize())


def conditions(results: Results) -> Figure:
    """Gold at the largest n, of each condition and ensemble, with its interval."""
    names = list(results.conditions if crowded(results) else results.findings)
    figure, axis = plt.subplots(figsize=(9, 1.3 + 0.32 * len(names)))
    for y, name in enumerate(reversed(names)):
        g = results.findings[name]["gold"]
        axis.errorbar(
            g.mean, y, xerr=[[g.mean - g.lo], [g.hi - g.mean]], fmt="o", color=colour(results, name), capsize=3
        )
    axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set_xlabel(f"gold at best of {results.findings[names[0]]['n']}, {UNIT}")
    return figure


def gold_against_proxy(results: Results) -> Figure:
    """Best-of-n and PPO on one plane; on the diagonal a gain is real, below it is the proxy's own."""
    figure, axis = plt.subplots(figsize=(7, 4.6))
    for method in ("bon", "ppo"):
        pairs = zip(_curves(results, method, "proxy"), _curves(results, method, "gold"), strict=True)
        for number, (proxy, gold) in enumerate(pairs):
            shown = style(results, gold.rm)
            shown |= {"marker": MARKERS[number % len(MARKERS)], "markevery": 1} if method == "ppo" else {}
            axis.plot(proxy.mean, gold.mean, "-" if method == "bon" else ":", label=gold.rm, **shown)
    top = max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([0, top], [0, top], color="0.7", linewidth=0.8)
    axis.set(xlabel=f"proxy, {UNIT}", ylabel="gold, in the same unit")
    legend(axis, results)
    return figure


def gold_by_proxy(results: Results) -> Figure:
    """Mean gold by quantile of the proxy: a tail that bends is extremal Goodhart."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for name in results.conditions:
        rows = [r for r in results.tail if r["rm"] == name]
        x, y, e = (np.array([r[k] for r in rows]) for k in ("quantile", "gold", "se"))
        shown = style(results, name)
        axis.errorbar(x, y, yerr=1.96 * e, fmt=f"-{shown['marker'] or 'o'}", markersize=3, color=shown["color"],
                      label=name, capsize=2)  # fmt: skip
    axis.set(xlabel="quantile of the proxy among the reference's samples", ylabel="mean gold, SD within prompts")
    legend(axis, results)
    return figure


def win_rate(results: Results) -> Figure:
    """Against one sample of the reference, by gold; no proxy can exceed n / (n + 1)."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for curve in _curves(results, "bon", "win_rate"):
        axis.plot(curve.x, curve.mean, label=curve.rm, **style(results, curve.rm))
        if not crowded(results):
            axis.fill_between(curve.x, *_band(curve.rows()), color=colour(results, curve.rm), alpha=0.12, linewidth=0)
    n = curve.x
    axis.plot(n, n / (n + 1), ":", color="0.3", label="n / (n + 1)")
    axis.set(xscale="log", xlabel="n", ylabel="win rate against the reference, by gold")
    legend(axis, results)
    return figure


def length(results: Results) -> Figure | None:
    """Length of what is chosen, the gold that choosing the longest would have given, and gold that is not length."""
    curves = _curves(results, "bon", "length")
    if not curves:
        return None
    beyond = _curves(results, "bon", "gold_beyond_length")
    figure, axes = plt.subplots(1, 3 if beyond else 2, figsize=(12 if beyond else 9, 3.8))
    left, middle, right = axes[0], axes[1], axes[-1]
    for curve in curves:
        left.plot(curve.d, curve.mean, label=curve.rm, **style(results, curve.rm))
    left.set(ylabel="length of the chosen response")
    for curve in _curves(results, "bon", "gold", [*results.conditions, "longest", "random"]):
        line = {"longest": ":", "random": "-."}.get(curve.rm, "-")
        named = curve.rm if curve.rm in ("longest", "random") else None
        middle.plot(curve.d, curve.mean, line, label=named, **style(results, curve.rm))
    middle.set(ylabel="gold gain, SD within prompts")
    for curve in beyond:
        right.plot(curve.d, curve.mean, label=curve.rm, **style(results, curve.rm))
    if beyond:
        right.set(ylabel="gold beyond its regression on length", ylim=middle.get_ylim())
    for axis in axes:
        axis.set_xlabel("sqrt(KL), nats$^{1/2}$")
    middle.legend(fontsize=8)
    legend(right if beyond else left, results)
    return figure


def harm(results: Results) -> Figure:
    """Gold gain of each prompt at the largest n: left of 0 are prompts that optimisation has harmed."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for curve in _curves(results, "bon", "gold"):
        values = np.sort(prompt_gains(curve))
        shown = style(results, curve.rm)
        name = curve.rm if crowded(results) else f"{curve.rm}: {np.mean(values < 0):.0%}"
        # A curve and not bars: bars of several conditions would hide each other.
        axis.plot(values, (np.arange(len(values)) + 0.5) / len(values), label=name, **shown)
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set(xlabel=f"gold gain of a prompt at best of {int(curve.x[-1])}, SD within prompts",
             ylabel="share of prompts below")  # fmt: skip
    legend(axis, results)
    return figure
