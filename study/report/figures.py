"""Figures of a study. The main one is in `overoptimisation`, those that compare sizes and rules in `comparisons`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from core.plotting import plt
from study.analysis.conditions import prompt_gains
from study.records import Results
from study.report import comparisons as arms
from study.report import overoptimisation as main
from study.report.overoptimisation import UNIT, kl_axis
from study.report.style import MARKERS, colour, crowded, legend, pick, style


def all_figures(results: Results) -> dict[str, Figure]:
    """Name -> figure; those without data are left out. The main one comes first."""
    if not results.conditions:  # policies of other tools, without pools
        few = {"overoptimisation": main.overoptimisation(results), "gold_against_proxy": gold_against_proxy(results),
               "ensembles_ppo": main.ensembles(results, "ppo"), "difference": arms.difference(results),
               "frontier": arms.frontier(results)}  # fmt: skip
        return {name: figure for name, figure in few.items() if figure is not None}
    drawn = {
        "overoptimisation": main.overoptimisation(results),
        "ensembles": main.ensembles(results),
        "ensembles_ppo": main.ensembles(results, "ppo"),
        "difference": arms.difference(results),
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
        pairs = zip(pick(results, method, "proxy"), pick(results, method, "gold"), strict=True)
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
    for curve in pick(results, "bon", "win_rate"):
        axis.plot(curve.x, curve.mean, label=curve.rm, **style(results, curve.rm))
        if not crowded(results):
            rows = curve.rows()
            axis.fill_between(curve.x, [r["band_lo"] for r in rows], [r["band_hi"] for r in rows],
                              color=colour(results, curve.rm), alpha=0.12, linewidth=0)  # fmt: skip
    n = curve.x
    axis.plot(n, n / (n + 1), ":", color="0.3", label="n / (n + 1)")
    axis.set(xscale="log", xlabel="n", ylabel="win rate against the reference, by gold")
    legend(axis, results)
    return figure


def length(results: Results) -> Figure | None:
    """Length of what is chosen, the gold that choosing the longest would have given, and gold that is not length."""
    curves = pick(results, "bon", "length")
    if not curves:
        return None
    beyond = pick(results, "bon", "gold_beyond_length")
    figure, axes = plt.subplots(1, 3 if beyond else 2, figsize=(12.5 if beyond else 9.5, 4))
    left, middle, right = axes[0], axes[1], axes[-1]
    for curve in curves:
        left.plot(curve.d, curve.mean, label=curve.rm, **style(results, curve.rm))
    left.set(ylabel="length of the chosen response")
    for curve in pick(results, "bon", "gold", [*results.conditions, "longest", "random"]):
        line = {"longest": ":", "random": "-."}.get(curve.rm, "-")
        named = curve.rm if curve.rm in ("longest", "random") else None
        middle.plot(curve.d, curve.mean, line, label=named, **style(results, curve.rm))
    middle.set(ylabel="gold gain, SD within prompts")
    for curve in beyond:
        right.plot(curve.d, curve.mean, label=curve.rm, **style(results, curve.rm))
    if beyond:
        right.set(ylabel="gold beyond its regression on length", ylim=middle.get_ylim())
    for axis in axes:
        kl_axis(axis)
    rules = dict(zip(*reversed(middle.get_legend_handles_labels()), strict=True))
    main.below(figure, rules, 2)
    legend(right if beyond else left, results)
    return figure


def harm(results: Results) -> Figure:
    """Gold gain of each prompt at the largest n: left of 0 are prompts that optimisation has harmed."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for curve in pick(results, "bon", "gold"):
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
