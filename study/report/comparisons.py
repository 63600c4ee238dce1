"""Figures of a study that compare arms: sizes, data and noise; ensembles; numbers that predict; KL coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from core.plotting import COLOURS, ON_DARK, ON_LIGHT, plt
from study.records import Results
from study.report.overoptimisation import band, below, by_kl, kl_axis
from study.report.style import MARKERS, colour, legend, pick, style
from study.report.words import in_words

AXES = {"pairs": "training pairs", "layers": "layers of the reward model"}
"""Sizes of a design -> how an axis names them."""

SHOWN = ("accuracy_gold", "accuracy", "spearman", "tail_spearman", "sd_within")
"""Numbers of reward models in the figure; the table has all."""


def scaling(results: Results) -> Figure | None:
    """alpha and beta of Gao et al.'s curve against the size of data and of the reward model, with 95% intervals."""
    cells = {c: results.findings[c] for c in results.conditions if results.findings[c]["fit"]}
    axes_of = [a for a in AXES if len({f[a] for f in cells.values() if f[a]}) > 1]
    if not axes_of:
        return None
    figure, axes = plt.subplots(
        2, len(axes_of), figsize=(5.5 * len(axes_of), 7), squeeze=False, sharex="col", sharey="row"
    )
    for column, axis_name in enumerate(axes_of):
        other = next(k for k in AXES if k != axis_name)
        lines: dict[tuple, list[dict]] = {}
        for facts in cells.values():
            if facts[axis_name]:
                lines.setdefault((facts["variant"], facts["label_noise"], facts[other]), []).append(facts)
        for row, name in enumerate(("alpha", "beta")):
            _lines(axes[row, column], lines, axis_name, name)
        sizes = sorted({f[axis_name] for f in cells.values() if f[axis_name]})
        axes[0, column].set(ylabel="" if column else "alpha", xscale="log")
        axes[1, column].set(ylabel="" if column else "beta", xlabel=AXES[axis_name])
        axes[1, column].set_xticks(sizes, [str(s) for s in sizes])
        axes[1, column].minorticks_off()
        axes[1, column].axhline(0, color="0.6", linewidth=0.8)
        axes[1, column].legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18), borderaxespad=0, ncol=2)
    return figure


def _lines(axis, lines: dict[tuple, list[dict]], axis_name: str, name: str) -> None:
    """A line for each variant and noise (its colour) and other size (its stroke and marker)."""
    shades = list(dict.fromkeys(key[:2] for key in lines))
    strokes = list(dict.fromkeys(key[2] for key in lines))
    other = next(k for k in AXES if k != axis_name)
    for number, ((variant, noise, size), line) in enumerate(lines.items()):
        line = sorted(line, key=lambda f: f[axis_name])
        # Lines of one size would hide each other's intervals: moved apart by 2% of the size.
        x = np.array([f[axis_name] for f in line]) * 1.02 ** (number - (len(lines) - 1) / 2)
        fits = [getattr(f["fit"], name) for f in line]
        mean = np.array([i.mean for i in fits])
        k = strokes.index(size)
        label = [variant]
        label += [f"noise {noise:g}"] if noise else []
        label += [f"{size} {other}"] if size else []
        axis.errorbar(
            x, mean, yerr=[mean - [i.lo for i in fits], [i.hi for i in fits] - mean], marker=MARKERS[k % len(MARKERS)],
            linestyle=("-", "--", ":", "-.")[k % 4], color=COLOURS[shades.index((variant, noise)) % len(COLOURS)],
            markersize=5, capsize=2, label=", ".join(label),
        )  # fmt: skip


def heat_map(results: Results) -> Figure | None:
    """R* and n* (gold at the cross-fitted peak, and where it is) by size, data, noise and variant."""
    cells = {c: results.findings[c] for c in results.conditions}
    pairs, layers = (sorted({f[a] for f in cells.values() if f[a]}) or [None] for a in AXES)
    panels = list(dict.fromkeys((f["variant"], f["label_noise"]) for f in cells.values()))
    if len(pairs) * len(layers) < 2:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    width = 1.4 + columns * max(1.5, 0.85 * len(pairs))
    figure, axes = plt.subplots(
        lines, columns, figsize=(width, 0.8 + lines * (0.9 + 0.55 * len(layers))), squeeze=False, sharex=True,
        sharey=True,
    )  # fmt: skip
    tops = [f["gold_at_peak"].mean for f in cells.values()]
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (variant, noise) in zip(axes.flat, panels, strict=False):
        grid = np.full((len(layers), len(pairs)), np.nan)
        shades = plt.get_cmap("cividis")
        for f in (f for f in cells.values() if (f["variant"], f["label_noise"]) == (variant, noise)):
            y, x = layers.index(f["layers"]), pairs.index(f["pairs"])
            grid[y, x] = top = f["gold_at_peak"].mean
            dark = (top - min(tops)) < 0.5 * (max(tops) - min(tops))
            axis.text(x, y, f"{top:+.2f}\nn* {f['peak_n'].mean:.0f}", ha="center", va="center", fontsize=8,
                      color=ON_DARK if dark else ON_LIGHT)  # fmt: skip
        axis.imshow(grid, cmap=shades, vmin=min(tops), vmax=max(tops), aspect="auto", origin="lower")
        axis.set_xticks(range(len(pairs)), [str(p or "all") for p in pairs])
        axis.set_yticks(range(len(layers)), [str(n or "all") for n in layers])
        axis.set_title(variant + (f", noise {noise:g}" if noise else ""), fontsize=9)
        axis.grid(False)
    figure.supxlabel(AXES["pairs"], fontsize=9)
    figure.supylabel("layers", fontsize=9)
    return figure


def disagreement(results: Results) -> Figure | None:
    """How far the seeds of a condition disagree on what their mean chooses."""
    curves = [c for c in results.curves if c.metric == "disagreement"]
    if not curves:
        return None
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for curve in curves:
        axis.plot(curve.d, curve.mean, label=curve.rm, **style(results, curve.rm))
    axis.set(ylabel="SD over seeds of the chosen response's proxy", ylim=(0, None))
    kl_axis(axis)
    legend(axis, results)
    return figure


def sweep(results: Results) -> Figure | None:
    """What each combiner of the seeds gains beyond their mean, in gold at the largest n; * excludes 0."""
    rows = [r for r in results.sweep if r["rule"] != "mean"]
    if not rows:
        return None
    rules, names = list(dict.fromkeys(r["rule"] for r in rows)), list(dict.fromkeys(r["rm"] for r in rows))
    grid = np.full((len(names), len(rules)), np.nan)
    figure, axis = plt.subplots(figsize=(3.2 + 0.85 * len(rules), 1.2 + 0.34 * len(names)))
    most = max(abs(r["difference"]) for r in rows) or 1.0
    for r in rows:
        y, x = names.index(r["rm"]), rules.index(r["rule"])
        grid[y, x] = r["difference"]
        mark = "*" if r["difference_lo"] > 0 or r["difference_hi"] < 0 else ""
        axis.text(x, y, f"{r['difference']:+.2f}{mark}", ha="center", va="center", fontsize=8,
                  color=ON_DARK if abs(r["difference"]) > 0.7 * most else ON_LIGHT)  # fmt: skip
    axis.imshow(grid, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
    axis.set_xticks(range(len(rules)), rules, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.grid(False)
    axis.set_title(f"gold at best of {rows[0]['n']} beyond that of the seeds' mean, SD within prompts", fontsize=9)
    return figure


def prediction(results: Results) -> Figure | None:
    """Each reward model: a number that needs no optimisation against what optimising it did."""
    if not results.prediction:
        return None
    metrics = [m for m in SHOWN if any(r["metric"] == m for r in results.prediction)]
    outcomes = list(dict.fromkeys(r["outcome"] for r in results.prediction))
    said = {"gold": "gold at the end", "gold_at_peak": "gold at the peak", "drop": "drop since the peak"}
    figure, axes = plt.subplots(
        len(outcomes), len(metrics), figsize=(1.1 + 1.75 * len(metrics), 0.9 + 1.6 * len(outcomes)), squeeze=False,
        sharex="col", sharey="row",
    )  # fmt: skip
    correlations = {(r["metric"], r["outcome"]): r["spearman"] for r in results.prediction}
    for (i, outcome), (j, metric) in ((a, b) for a in enumerate(outcomes) for b in enumerate(metrics)):
        axis = axes[i, j]
        for name in results.conditions:
            mine = [r for r in results.rms if r["condition"] == name]
            shown = {"marker": "o", **style(results, name)}
            axis.scatter([getattr(r[metric], "mean", r[metric]) for r in mine], [r[outcome] for r in mine], s=14,
                         color=shown["color"], marker=shown["marker"] or "o")  # fmt: skip
        if (r := correlations.get((metric, outcome))) is not None:
            axis.set_title(f"rank correlation {r:+.2f}", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=4)
        if i == len(outcomes) - 1:
            axis.set_xlabel(metric.replace("_", " "), fontsize=8)
        if not j:
            axis.set_ylabel(said[outcome], fontsize=8)
    return figure


def frontier(results: Results) -> Figure | None:
    """Gold against measured KL, a line a KL coefficient: whether the penalty moves the frontier or only stops early.
    A panel a condition, with one y axis; seeds together where there are several."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for name, facts in results.pooled.items():
        if facts["kl_coef"] is not None:
            groups.setdefault(facts["condition"], []).append((facts["kl_coef"], name))
    groups = {condition: sorted(names) for condition, names in groups.items() if len(names) > 1}
    if not groups:
        return None
    figure, axes = _grid(len(groups), min(3, len(groups)), 4.2, 3.4)
    drawn = {}
    for axis, (condition, names) in zip(axes, groups.items(), strict=False):
        for number, (coef, name) in enumerate(names):
            facts = results.pooled[name]
            kind, of = ("ppo_pooled", [name]) if facts["seeds"] > 1 else ("ppo", facts["policies"])
            shown = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            [line] = axis.plot(*by_kl(pick(results, kind, "gold", of)[0]), markersize=4, markevery=0.12, **shown)
            drawn[f"KL coefficient {coef:g}"] = line
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_title(in_words(results, condition), fontsize=9)
        kl_axis(axis)
    axes[0].set_ylabel("gold gain, SD within prompts")
    below(figure, drawn, 4)
    return figure


def difference(results: Results) -> Figure | None:
    """Gold of one condition's policies less that of another's at each KL, with the 95% simultaneous band."""
    curves = [c for c in results.curves if c.metric == "gold_difference"]
    if not curves:
        return None
    figure, axes = _grid(len(curves), min(3, len(curves)), 4.2, 3.2)
    for axis, curve, facts in zip(axes, curves, results.policy_differences, strict=False):
        shade = colour(results, facts["policies"])
        axis.plot(*by_kl(curve), color=shade)
        band(axis, curve, shade)
        axis.axhline(0, color="0.4", linewidth=0.8)
        words = in_words(results, facts["policies"]), in_words(results, facts["less"])
        axis.set_title(f"{words[0]}\nless {words[1]} ({facts['seeds']} seeds)", fontsize=9)
        kl_axis(axis)
    axes[0].set_ylabel("gold of the first less the second,\nSD within prompts")
    return figure


def _grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, Sequence]:
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False, sharey=True)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat)
