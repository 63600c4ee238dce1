"""Figures of a study. Colours are safe for the colour-blind and mean one condition everywhere; gold is solid, proxy
dashed; what is not to be trusted is grey."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pipelines.figures import COLOURS, plt
from pipelines.study_results import Results

MARKERS = "osD^vPX"
UNIT = "gain over the reference, SD within prompts"


def all_figures(found: Results) -> dict[str, Figure]:
    """Name -> figure; those without data are left out. The main one comes first."""
    figures = {
        "overoptimisation": overoptimisation(found),
        "conditions": conditions(found),
        "gold_against_proxy": gold_against_proxy(found),
        "gold_by_proxy": gold_by_proxy(found),
        "win_rate": win_rate(found),
        "length": length(found),
        "harm": harm(found),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def colour(found: Results, name: str) -> str:
    """One a condition; a policy or ensemble has that of its condition."""
    base = max((c for c in found.conditions if name.startswith(c)), key=len, default=None)
    return COLOURS[list(found.conditions).index(base) % len(COLOURS)] if base else "0.45"


def _curves(found: Results, method: str, metric: str, names: Sequence[str] | None = None) -> list:
    wanted = found.conditions if names is None else names
    return [
        c for c in found.curves if c.method == method and c.metric == metric and (method == "ppo" or c.rm in wanted)
    ]


def overoptimisation(found: Results) -> Figure:
    """Gold and proxy, in one unit, against sqrt(KL), with 95% simultaneous bands of gold."""
    policies = _curves(found, "ppo", "gold")
    figure, axes = plt.subplots(1, 2 if policies else 1, figsize=(11 if policies else 7, 4.6), squeeze=False)
    left = axes[0, 0]
    for metric, style in (("gold", "-"), ("proxy", "--")):
        for curve in _curves(found, "bon", metric):
            rows, shade = curve.rows(), colour(found, curve.rm)
            label = curve.rm if metric == "gold" else None
            left.plot(curve.d, curve.mean, style, color=shade, label=label)
            if metric == "gold":
                left.fill_between(curve.d, *_band(rows), color=shade, alpha=0.15, linewidth=0)
    best = _curves(found, "bon", "gold", ["oracle"])[0]
    left.plot(best.d, best.mean, ":", color="0.3", label="oracle: chosen by gold")
    _untrusted(left, best)
    left.set(title="Best-of-n (KL: log n - (n-1)/n, an upper bound)", ylabel=UNIT)
    _n_axis(left, best)
    if policies:
        right = axes[0, 1]
        for metric, style in (("gold", "-"), ("proxy", "--")):
            for number, curve in enumerate(_curves(found, "ppo", metric)):
                order, shade = np.argsort(curve.d), colour(found, curve.rm)
                label = curve.rm if metric == "gold" else None
                right.plot(curve.d[order], curve.mean[order], style, color=shade, marker=MARKERS[number % 7],
                           markersize=4, label=label)  # fmt: skip
                if metric == "gold":
                    lo, hi = _band(curve.rows())
                    right.fill_between(curve.d[order], lo[order], hi[order], color=shade, alpha=0.15, linewidth=0)
        right.set(title="PPO (KL: measured on samples)")
    for axis in axes[0]:
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xlabel("sqrt(KL from the reference), nats$^{1/2}$")
        axis.legend(fontsize=7, loc="upper left")
    return figure


def _band(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([r[k] for r in rows]) for k in ("band_lo", "band_hi"))


def _untrusted(axis, curve) -> None:
    beyond = curve.d[curve.x > curve.pool // 4]
    if len(beyond) > 1:
        axis.axvspan(beyond[0], beyond[-1], color="0.92", zorder=0)
        axis.text(beyond[-1], axis.get_ylim()[0], "few draws ", fontsize=7, color="0.4", ha="right", va="bottom")


def _n_axis(axis, curve) -> None:
    """n above, where KL is below."""
    ticks = [k for k in range(len(curve.x)) if np.log2(curve.x[k]) % 1 == 0]
    top = axis.secondary_xaxis("top")
    top.set_xticks([curve.d[k] for k in ticks], [f"{int(curve.x[k])}" for k in ticks], fontsize=7)
    top.tick_params(length=2)
    axis.set_title(axis.get_title(), pad=16)


def conditions(found: Results) -> Figure:
    """Gold at the largest n that is trusted, of each condition and ensemble, with its interval."""
    names = list(found.found)
    figure, axis = plt.subplots(figsize=(9, 1.3 + 0.32 * len(names)))
    for y, name in enumerate(reversed(names)):
        g = found.found[name]["gold"]
        axis.errorbar(g.mean, y, xerr=[[g.mean - g.lo], [g.hi - g.mean]], fmt="o", color=colour(found, name), capsize=3)
    axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set_xlabel(f"gold at best of {found.found[names[0]]['n_trusted']}, {UNIT}")
    return figure


def gold_against_proxy(found: Results) -> Figure:
    """Best-of-n and PPO on one plane; on the diagonal a gain is real, below it is the proxy's own."""
    figure, axis = plt.subplots(figsize=(6, 4.6))
    for method in ("bon", "ppo"):
        pairs = zip(_curves(found, method, "proxy"), _curves(found, method, "gold"), strict=True)
        for number, (proxy, gold) in enumerate(pairs):
            marker = {"marker": MARKERS[number % 7], "markersize": 4} if method == "ppo" else {}
            axis.plot(proxy.mean, gold.mean, "-" if method == "bon" else ":", color=colour(found, gold.rm),
                      label=gold.rm, **marker)  # fmt: skip
    top = max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([0, top], [0, top], color="0.7", linewidth=0.8)
    axis.set(xlabel=f"proxy, {UNIT}", ylabel="gold, likewise")
    axis.legend(fontsize=7)
    return figure


def gold_by_proxy(found: Results) -> Figure:
    """Mean gold by quantile of the proxy: a tail that bends is extremal Goodhart."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for name in found.conditions:
        rows = [r for r in found.tail if r["rm"] == name]
        x, y, e = (np.array([r[k] for r in rows]) for k in ("quantile", "gold", "se"))
        axis.errorbar(x, y, yerr=1.96 * e, fmt="-o", markersize=3, color=colour(found, name), label=name, capsize=2)
    axis.set(xlabel="quantile of the proxy among the reference's samples", ylabel="mean gold, SD within prompts")
    axis.legend(fontsize=7)
    return figure


def win_rate(found: Results) -> Figure:
    """Against one sample of the reference, by gold; no proxy can exceed n / (n + 1)."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for curve in _curves(found, "bon", "win_rate"):
        axis.plot(curve.x, curve.mean, color=colour(found, curve.rm), label=curve.rm)
        axis.fill_between(curve.x, *_band(curve.rows()), color=colour(found, curve.rm), alpha=0.12, linewidth=0)
    n = curve.x
    axis.plot(n, n / (n + 1), ":", color="0.3", label="n / (n + 1)")
    axis.set(xscale="log", xlabel="n", ylabel="win rate against the reference, by gold")
    axis.legend(fontsize=7)
    return figure


def length(found: Results) -> Figure | None:
    """Length of what is chosen, and the gold that choosing the longest would have given."""
    curves = _curves(found, "bon", "length")
    if not curves:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for curve in curves:
        left.plot(curve.d, curve.mean, color=colour(found, curve.rm), label=curve.rm)
    left.set(xlabel="sqrt(KL)", ylabel="length of the chosen response")
    for curve in _curves(found, "bon", "gold", [*found.conditions, "longest", "random"]):
        style = {"longest": ":", "random": "-."}.get(curve.rm, "-")
        right.plot(curve.d, curve.mean, style, color=colour(found, curve.rm), label=curve.rm)
    right.set(xlabel="sqrt(KL)", ylabel=f"gold, {UNIT}")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    return figure


def harm(found: Results) -> Figure:
    """Gold gain of each prompt at the largest trusted n: left of 0 are prompts that optimisation has harmed."""
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for curve in _curves(found, "bon", "gold"):
        k = int(np.flatnonzero(curve.x <= max(1, curve.pool // 4))[-1])
        values = curve.values[..., k].mean(axis=0)
        axis.hist(values, bins=30, histtype="step", color=colour(found, curve.rm),
                  label=f"{curve.rm}: {np.mean(values < 0):.0%} below 0")  # fmt: skip
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set(xlabel=f"gold gain of a prompt at best of {int(curve.x[k])}, SD within prompts", ylabel="prompts")
    axis.legend(fontsize=7)
    return figure
