"""Figures of Gao, Schulman and Hilton, "Scaling laws for reward model overoptimization" (2210.10760)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.plotting import COLOURS, plt
from study.analysis.fits import predict
from study.papers.draw import (
    METHODS,
    finish,
    gold_and_proxy,
    grouped,
    millions,
    palette,
    panels,
    refuse,
    shades,
    title,
)
from study.papers.read import Arm, Record
from study.report.overoptimisation import below

SIZES = "give study.layers several sizes, such as study.layers=[6,12,24], or --design a table of them"
PAIRS = "give study.pairs several numbers, such as study.pairs=[96,192,384], or --design a table of them"
POLICIES = "train some: study.ppo_variants, with study.ppo_seeds=3 for intervals"


def by_size(records: Sequence[Record], method: str) -> Figure:
    """Gold and proxy against KL, one curve a size of the reward model on one pair of axes."""
    record, name = records[0], f"gao-{method}"
    arms = [a for a in record.arms(method) if a.size]
    if method == "ppo" and not record.ppo:
        raise refuse(name, record, "no policies", POLICIES)
    groups = _varied(arms, "size", "variant", "pairs", "label_noise", "kl_coef")
    if not groups:
        raise refuse(name, record, "reward models of one size only", SIZES)
    figure, axes = panels(len(groups))
    colour = shades(a.size for arms in groups.values() for a in arms)
    drawn = {}
    for axis, (one, members) in zip(axes, groups.items(), strict=True):
        for arm in sorted(members, key=lambda a: a.size):
            if handle := gold_and_proxy(axis, record, arm, method, colour[arm.size]):
                drawn[millions(arm.size)] = handle
        axis.set_title(title(one), fontsize=9)
    return finish(figure, axes, drawn)


def coefficients(records: Sequence[Record], axis_name: str) -> Figure:
    """alpha and beta against parameters or pairs, best-of-n beside PPO, a line a variant, noise and other size."""
    record, name = records[0], f"gao-{axis_name}"
    key, others = ("size", ("variant", "pairs")) if axis_name == "parameters" else ("pairs", ("variant", "layers"))
    found = {
        m: _varied([a for a in record.arms(m) if a.fit("alpha")], key, *others, "label_noise", "kl_coef")
        for m in METHODS
    }
    found = {m: groups for m, groups in found.items() if groups}
    if not found:
        raise refuse(name, record, f"no two fits that differ in their {axis_name}", SIZES if key == "size" else PAIRS)
    figure, grid = plt.subplots(2, len(found), figsize=(max(5.6, 4.6 * len(found)), 6.4), squeeze=False, sharex=True)
    colour = palette(title(one) for groups in found.values() for one in groups)
    drawn = {}
    for column, (method, groups) in enumerate(found.items()):
        for row, which in enumerate(("alpha", "beta")):
            axis = grid[row, column]
            for number, (one, arms) in enumerate(groups.items()):
                arms = sorted(arms, key=lambda a: _value(a, key))
                # Lines of one size would hide each other's intervals: moved apart by 2%.
                x = np.array([_value(a, key) for a in arms]) * 1.02 ** (number - (len(groups) - 1) / 2)
                mean, lo, hi = np.array([a.fit(which) for a in arms]).T
                drawn[title(one)] = axis.errorbar(
                    x, mean, yerr=[mean - lo, hi - mean], marker="o", markersize=4, capsize=2, color=colour[title(one)]
                ).lines[0]
            axis.axhline(0, color="0.6", linewidth=0.8)
            axis.set_xscale("log")
        ticks = sorted({_value(a, key) for arms in groups.values() for a in arms})
        grid[1, column].set_xticks(ticks, [millions(t) if key == "size" else f"{t:g}" for t in ticks])
        grid[1, column].minorticks_off()
        grid[1, column].set_xlabel("parameters of the reward model" if key == "size" else "training pairs")
        grid[0, column].set_title(METHODS[method])
    grid[0, 0].set_ylabel("alpha")
    grid[1, 0].set_ylabel("beta")
    below(figure, drawn, 2)
    return figure


def policy_size(records: Sequence[Record]) -> Figure:
    """Studies of several policies: gold and proxy of the first condition that all of them have."""
    sizes = [r.about.get("policy_params") for r in records]
    if len(records) < 2 or None in sizes or len(set(sizes)) < 2:
        known = ", ".join(f"{r.folder}: {r.about.get('policy', 'not known')}" for r in records)
        raise refuse("gao-policy-size", records[0], f"one policy ({known})",
                     "give the runs of two studies or more that differ in policy.path")  # fmt: skip
    shared = set.intersection(*({a.name for a in r.bon if a.rule is None} for r in records))
    if not shared:
        raise refuse("gao-policy-size", records[0], "no condition in common with the others", "name variants alike")
    name = next(a.name for a in records[0].bon if a.name in shared)
    methods = [m for m in METHODS if all(_arm_of(r, m, name) for r in records)]
    figure, axes = panels(len(methods))
    colour, drawn = shades(s for s in sizes if s), {}
    for axis, method in zip(axes, methods, strict=True):
        for size, record in sorted(zip(sizes, records, strict=True), key=lambda pair: pair[0] or 0):
            arm = _arm_of(record, method, name)
            if arm and size and (handle := gold_and_proxy(axis, record, arm, method, colour[size])):
                drawn[f"policy of {millions(size)}"] = handle
        axis.set_title(f"{METHODS[method]}, {name}", fontsize=9)
    return finish(figure, axes, drawn)


def loss(records: Sequence[Record]) -> Figure:
    """Gold of best-of-n at its end and at its peak against the validation loss, a point a reward model."""
    record = records[0]
    rms = [r for r in record.rms if r.get("val_loss_nats") is not None]
    if len(rms) < 3:
        raise refuse("gao-loss", record, f"validation losses of {len(rms)} reward models",
                     "give --design a table with val_loss_nats")  # fmt: skip
    variant = {a.name: a.variant for a in record.bon}
    colour = palette(variant.get(r["condition"], r["condition"]) for r in rms)
    figure, axes = panels(2, share=True)
    drawn = {}
    for axis, (key, words) in zip(axes, {"gold": "at the end", "gold_at_peak": "at its peak"}.items(), strict=True):
        for name, shade in colour.items():
            mine = [r for r in rms if variant.get(r["condition"], r["condition"]) == name]
            drawn[name] = axis.plot([r["val_loss_nats"] for r in mine], [r[key] for r in mine], "o", color=shade,
                                    markersize=5)[0]  # fmt: skip
        axis.set(xlabel="validation loss, nats a pair", title=f"gold of best-of-n {words}")
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("gain, SD within prompts")
    below(figure, drawn, 4)
    return figure


def peak(records: Sequence[Record]) -> Figure:
    """Gold at the peak as alpha and beta of the other sizes predict it, against what was seen.

    alpha and beta are lines in the log of the size, fitted without the reward model that is predicted (Gao et al. fit
    them to all, figure 12). The predicted peak is the largest value of the curve on the range that was measured.
    """
    record = records[0]
    figure, axis = plt.subplots(figsize=(5.6, 5.2))
    seen: list[float] = []
    drawn: dict[str, Line2D] = {}
    for method in METHODS:
        arms = [a for a in record.arms(method) if a.fit("alpha") and a.size]
        groups = _varied(arms, "size", "variant", "pairs", "label_noise", "kl_coef", least=4)
        for one, members in groups.items():
            points = [_predicted(a, [b for b in members if b is not a], method) for a in members]
            x, y, lo, hi = np.array(points).T
            label = f"{METHODS[method]}, {title(one)}"
            shade = COLOURS[len(drawn) % len(COLOURS)]
            drawn[label] = axis.errorbar(x, y, xerr=[x - lo, hi - x], fmt="o" if method == "bon" else "s", capsize=2,
                                         color=shade).lines[0]  # fmt: skip
            seen += [*x, *y]
    if not seen:
        plt.close(figure)
        raise refuse("gao-peak", record, "no four sizes of one variant with a fit", SIZES)
    span = [min(seen), max(seen)]
    axis.plot(span, span, color="0.6", linewidth=0.8)
    axis.set(xlabel="gold at the peak, seen (cross-fitted)", ylabel="gold at the peak, predicted from other sizes")
    below(figure, drawn, 1)
    return figure


def _predicted(arm: Arm, others: Sequence[Arm], method: str) -> tuple[float, float, float, float]:
    """Seen and predicted gold at the peak, and the interval of the seen one."""
    logs = np.log(np.array([b.size for b in others]))
    own = np.log(arm.size)
    terms = np.stack([np.ones_like(logs), logs], axis=1)
    fits = np.array([[b.facts["fit"][which]["mean"] for which in ("alpha", "beta")] for b in others])
    parameters = np.array([1.0, own]) @ np.linalg.lstsq(terms, fits, rcond=None)[0]
    d = np.linspace(0.05, arm.facts["fit"]["d_max"], 200)
    top = float(predict(parameters, d, "bon" if method == "bon" else "rl").max())
    seen = arm.facts["gold_at_peak"]
    return seen["mean"], top, seen["lo"], seen["hi"]


def _varied(arms: Sequence[Arm], key: str, *others: str, least: int = 2) -> dict:
    """Groups of arms that differ in `key` and in nothing else, of `least` values of it at least."""
    groups = grouped([a for a in arms if _value(a, key)], *others)
    return {one: members for one, members in groups.items() if len({_value(a, key) for a in members}) >= least}


def _value(arm: Arm, key: str) -> float:
    return arm.size if key == "size" else float(arm.facts.get(key) or 0)


def _arm_of(record: Record, method: str, condition: str) -> Arm | None:
    """The arm of a condition, with the smallest KL coefficient."""
    found = [a for a in record.arms(method) if (a.name if method == "bon" else a.facts["condition"]) == condition]
    return min(found, key=lambda a: a.kl_coef or 0) if found else None
