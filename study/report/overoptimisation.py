"""The main figure of a study: gold and proxy in one unit against KL, best-of-n beside PPO; and ensembles in the same
way. Gold is solid and has its 95% simultaneous band, the proxy is dashed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.plotting import COLOURS, plt
from study.analysis.conditions import Curve
from study.records import Results
from study.report.style import MARKERS, cell, cells, colour, crowded, pick
from study.report.words import coefficients, in_words, of_cell, optimised_by

UNIT = "gain over the reference, SD within prompts"
KL_TICKS = (0, 0.25, 1, 2, 4, 6, 9, 16, 25, 36, 49, 64, 100, 144, 196, 256, 400, 625, 900)
"""Nats; a figure shows those that leave room for each other."""
KL_LABEL = "KL from the reference, nats (square-root scale)"
BESIDES = 0.25
"""A band may add so much of the range of the curves above and below them; what is wider is cut."""


@dataclass(frozen=True)
class Panel:
    title: str
    method: str
    names: Sequence[str]
    """Of conditions (bon), or of policies of one condition (ppo)."""


def overoptimisation(results: Results, *, narrow: bool = False) -> Figure:
    """Best-of-n in a panel, or in one a size and noise where there are more conditions than colours, and PPO likewise.
    All panels have one y axis. `narrow`: panels below each other, for a phone."""
    shown = panels(results)
    small = len(shown) > 2
    columns = min(len(shown), (2 if small else 1) if narrow else (4 if small else 2))
    lines = -(-len(shown) // columns)
    width, height = (4.6, 2.5 if small else 3.7) if narrow else (11 if columns > 1 else 7, 2.7 if small else 4.4)
    figure, grid = plt.subplots(lines, columns, figsize=(width, height * lines + 0.7), squeeze=False, sharey=True)
    for axis in grid.flat[len(shown) :]:
        axis.set_visible(False)
    drawn: dict[str, Line2D] = {}
    for axis, panel in zip(grid.flat, shown, strict=False):
        draw = _best_of_n if panel.method == "bon" else _policies
        drawn |= draw(axis, results, panel)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_title(panel.title, fontsize=8 if small else 10, pad=16 if panel.method == "bon" else 6)
        kl_axis(axis, "KL, nats" if small else KL_LABEL)
    _limits(list(grid.flat[: len(shown)]))
    for row in grid:
        row[0].set_ylabel("gain, SD within prompts" if small or narrow else UNIT)
    keys = {"gold": Line2D([], [], color="0.3"), "proxy": Line2D([], [], color="0.3", linestyle="--")}
    below(figure, drawn | keys, 1 if narrow and max(map(len, drawn)) > 24 else 2 if narrow else 4)
    return figure


def panels(results: Results) -> list[Panel]:
    """Best-of-n first, then PPO."""
    together = {name for facts in results.pooled.values() for name in facts["policies"]}
    groups = [*results.pooled, *(name for name in results.policies if name not in together)]
    bon, by = "Best-of-n (KL: a bound)", optimised_by(results)[0]
    ppo = f"{by} (KL: {'measured' if by == 'PPO' else 'an upper bound'})"
    if not crowded(results):
        shown = [Panel(bon, "bon", list(results.conditions))] if results.conditions else []
        return shown + ([Panel(ppo, "ppo", groups)] if groups else [])
    shown = []
    for one in cells(results):
        names = [c for c in results.conditions if cell(results, c) == one]
        shown.append(Panel(f"{bon}\n{of_cell(one)}", "bon", names))
    by_cell: dict[tuple | None, list[str]] = {}
    for name in groups:
        base = results.condition_of(name)
        by_cell.setdefault(cell(results, base) if base else None, []).append(name)
    return shown + [Panel(f"{ppo}\n{of_cell(one) if one else ''}", "ppo", names) for one, names in by_cell.items()]


def _best_of_n(axis, results: Results, panel: Panel) -> dict[str, Line2D]:
    drawn = {}
    for metric, line in (("gold", "-"), ("proxy", "--")):
        for curve in pick(results, "bon", metric, panel.names):
            shade = colour(results, curve.rm)
            [handle] = axis.plot(curve.d, curve.mean, line, color=shade)
            if metric == "gold":
                drawn[_named(results, curve.rm)] = handle
                band(axis, curve, shade)
    best = pick(results, "bon", "gold", ["oracle"])[0]
    [drawn["choice by gold itself"]] = axis.plot(best.d, best.mean, ":", color="0.3")
    n_axis(axis, best)
    return drawn


def _policies(axis, results: Results, panel: Panel) -> dict[str, Line2D]:
    """Policies of several seeds: their pooled curve, and each as a thin line."""
    drawn, coefs = {}, coefficients(results)
    combined = [n for n in results.pooled if results.pooled[n]["rule"]]
    for name in panel.names:
        facts = {**results.policies, **results.pooled}[name]
        shade = colour(results, name)
        if name in combined and not crowded(results):  # not the colour of its members, which are in this panel too
            shade = COLOURS[(len(results.conditions) + combined.index(name)) % len(COLOURS)]
        marker = MARKERS[coefs.index(facts["kl_coef"]) % len(MARKERS)] if facts["kl_coef"] in coefs else "o"
        runs = facts.get("policies", [name])
        together = facts.get("seeds", 1) > 1
        for metric, line in (("gold", "-"), ("proxy", "--")):
            for curve in pick(results, "ppo", metric, runs) if together else ():
                axis.plot(*by_kl(curve), line, color=shade, linewidth=0.7, alpha=0.45, marker=marker, markersize=2.5)
            curves = pick(results, "ppo_pooled", metric, [name]) if together else pick(results, "ppo", metric, runs)
            for curve in curves:
                dots: dict = {"marker": marker, "markersize": 4} if not together or len(coefs) > 1 else {}
                dots |= {"markevery": 0.15} if together and dots else {}
                [handle] = axis.plot(*by_kl(curve), line, color=shade, linewidth=2.0 if together else 1.5, **dots)
                if metric == "gold":
                    drawn[_named(results, name)] = handle
                    band(axis, curve, shade)
    return drawn


def _named(results: Results, name: str) -> str:
    """As the legend says it: a variant alone where the panels have the rest in their titles."""
    base = results.condition_of(name)
    condition = results.designs.get(results.pooled.get(name, {}).get("condition") or name)
    if crowded(results) and base in results.designs:
        words = results.designs[base].variant
        if condition is not None and condition.rule:
            words = f"the {condition.rule} of {condition.combined} {words}"
        coef = {**results.policies, **results.pooled}.get(name, {}).get("kl_coef")
        return words + (f", KL coefficient {coef:g}" if coef is not None and len(coefficients(results)) > 1 else "")
    return in_words(results, name)


def ensembles(results: Results, method: str = "bon") -> Figure | None:
    """Gold of each ensemble beside its members on average (mean, WCO and UWO of Coste et al. 2310.02743), a panel a
    condition, with one y axis; the proxies are dashed. `method`: bon, or ppo for policies against ensembles."""
    groups = _ensembles_of(results, method)
    if not groups:
        return None
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    width = max(5.6, 3.8 * columns)
    figure, grid = plt.subplots(lines, columns, figsize=(width, 3.2 * lines + 0.6), squeeze=False, sharey=True)
    rules = list(dict.fromkeys(rule for members in groups.values() for rule in members))
    drawn: dict[str, Line2D] = {}
    for axis in grid.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (title, members) in zip(grid.flat, groups.items(), strict=False):
        for rule, curves in members.items():
            shade = "0.3" if rule == ALONE else COLOURS[(rules.index(rule) - (ALONE in rules)) % len(COLOURS)]
            for metric, line in (("proxy", "--"), ("gold", "-")):
                [handle] = axis.plot(*by_kl(curves[metric]), line, color=shade)
            drawn[rule] = handle
            band(axis, curves["gold"], shade)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        kl_axis(axis)
    _limits(list(grid.flat[: len(groups)]))
    for row in grid:
        row[0].set_ylabel("gain, SD within prompts")
    below(figure, drawn, 4)
    return figure


ALONE = "one reward model, mean over seeds"


def _ensembles_of(results: Results, method: str) -> dict[str, dict[str, dict[str, Curve]]]:
    """Title of a panel -> rule -> metric -> curve."""
    found: dict[str, dict[str, dict[str, Curve]]] = {}
    for name in results.findings if method == "bon" else results.pooled:
        facts = results.pooled.get(name, {})
        condition = results.designs.get(facts.get("condition", name))
        if condition is None:
            continue
        kind = "bon" if method == "bon" else "ppo_pooled" if facts["seeds"] > 1 else "ppo"
        of = [name] if kind != "ppo" else facts["policies"]
        curves = {m: pick(results, kind, m, of)[0] for m in ("gold", "proxy")}
        coef = f", KL coefficient {facts['kl_coef']:g}" if len(coefficients(results)) > 1 and facts else ""
        title = in_words(results, condition.members.name) + coef
        found.setdefault(title, {})[condition.rule or ALONE] = curves
    return {title: rules for title, rules in found.items() if rules.keys() - {ALONE}}


def by_kl(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(KL) and means in its order; training may fall back in KL."""
    order = np.argsort(curve.d, kind="stable")
    return curve.d[order], curve.mean[order]


def band(axis, curve: Curve, shade: str) -> None:
    rows = sorted(curve.rows(), key=lambda r: r["d"])
    axis.fill_between([r["d"] for r in rows], [r["band_lo"] for r in rows], [r["band_hi"] for r in rows],
                      color=shade, alpha=0.15, linewidth=0)  # fmt: skip


def kl_axis(axis, label: str = "") -> None:
    """Nats where sqrt(KL) is drawn: Gao et al.'s scale, with the numbers that people know."""
    top = max((float(np.max(line.get_xdata())) for line in axis.lines if len(line.get_xdata()) > 2), default=1.0)
    width, last = max(top, 0.1), -1.0
    ticks: list[float] = []
    for kl in KL_TICKS:
        at = kl**0.5
        if at <= top * 1.02 and at - last >= width / 7:
            ticks, last = [*ticks, kl], at
    axis.set_xticks([t**0.5 for t in ticks], [f"{t:g}" for t in ticks])
    axis.set_xlabel(label or KL_LABEL, fontsize=9)


def n_axis(axis, curve: Curve) -> None:
    """n above, where KL is below."""
    powers = [k for k in range(len(curve.x)) if np.log2(curve.x[k]) % 1 == 0]
    ticks = powers if len(powers) < 8 else powers[::2]
    top = axis.secondary_xaxis("top")
    top.set_xticks([curve.d[k] for k in ticks], [f"n = {int(curve.x[k])}" if not i else f"{int(curve.x[k])}"
                                                 for i, k in enumerate(ticks)], fontsize=7)  # fmt: skip
    top.tick_params(length=2)


def _limits(axes: Sequence) -> None:
    """One range for all panels: that of the curves, and of bands as far as they are not much wider."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for axis in axes for line in axis.lines])
    low, high = float(values.min()), float(values.max())
    room = BESIDES * (high - low or 1.0)
    seen = [axis.get_ylim() for axis in axes]
    axes[0].set_ylim(max(min(s[0] for s in seen), low - room), min(max(s[1] for s in seen), high + room))


def below(figure: Figure, drawn: dict[str, Line2D], columns: int) -> None:
    """A legend under the axes, so that it lies on no curve."""
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower left", ncols=min(columns, len(drawn)), fontsize=8,
        frameon=False,
    )  # fmt: skip
