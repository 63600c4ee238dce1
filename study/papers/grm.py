"""Figures and tables of Yang et al., "Regularizing hidden states enables learning generalizable reward model for LLMs"
(2406.10216)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from study.papers.draw import GAIN, finish, gold_and_proxy, grouped, limits, palette, panels, refuse, title
from study.papers.gao import POLICIES
from study.papers.read import Arm, Record

KEYS = ("pairs", "layers", "label_noise")


def best_of_n(records: Sequence[Record]) -> Figure:
    """Figure 3: gold and proxy of best-of-n against KL, a line a method with its seeds together."""
    record = records[0]
    if not record.bon:
        raise refuse("grm-bon", record, "no pools", "give `grm study --scores` the samples, or run best-of-n")
    groups = grouped(record.bon, *KEYS)
    colour = palette(arm.variant for arm in record.bon)
    figure, axes = panels(len(groups))
    drawn = {}
    for axis, (one, arms) in zip(axes, groups.items(), strict=True):
        for arm in arms:
            if handle := gold_and_proxy(axis, record, arm, "bon", colour[arm.variant]):
                drawn[arm.variant] = handle
        axis.set_title(title(one) or "best-of-n", fontsize=9)
    return finish(figure, axes, drawn)


def ppo(records: Sequence[Record]) -> Figure:
    """Figure 4: gold and proxy of PPO, a line a method with its seeds together: against KL above, by step below.

    By step the band is the range of the seeds.
    """
    record = records[0]
    groups = grouped(record.ppo, *KEYS, "kl_coef")
    if not groups:
        raise refuse("grm-ppo", record, "no policies", POLICIES)
    colour = palette(arm.variant for arm in record.ppo)
    figure, axes = panels(2 * len(groups), len(groups))
    drawn = {}
    for column, (one, arms) in enumerate(groups.items()):
        above, along = axes[column], axes[len(groups) + column]
        for arm in arms:
            seeds = f"{arm.variant} ({arm.facts['seeds']} seed{'s' if arm.facts['seeds'] > 1 else ''})"
            if handle := gold_and_proxy(above, record, arm, "ppo", colour[arm.variant]):
                drawn[seeds] = handle
            _along(along, record, arm, colour[arm.variant])
        above.set_title(title(one) or "PPO", fontsize=9)
    finish(figure, axes[: len(groups)], drawn)
    for axis in axes[len(groups) :]:
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xlabel("PPO step", fontsize=9)
    limits(axes)
    axes[len(groups)].set_ylabel(GAIN)
    return figure


def _along(axis, record: Record, arm: Arm, shade: str) -> None:
    for metric, stroke in (("proxy", "--"), ("gold", "-")):
        lines = [line for name in arm.runs if (line := record.line("ppo", metric, name))]
        steps = sorted(set.intersection(*(set(line.x.tolist()) for line in lines)))
        values = np.array([[line.mean[line.x.tolist().index(s)] for s in steps] for line in lines])
        axis.plot(steps, values.mean(axis=0), stroke, color=shade)
        if metric == "gold":
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=shade, alpha=0.13, linewidth=0)


def tables(records: Sequence[Record], evaluated: Mapping[str, Mapping[str, float]]) -> str:
    """Tables 1 and 2: accuracy by method, a table for each number of training pairs and share of wrong labels.

    Args:
        evaluated: reward model -> set -> accuracy, of `grm rm-eval`, which are out of distribution; in distribution is
            the held-out accuracy that the study has.
    """
    record = records[0]
    known = [r for r in record.rms if r.get("accuracy_gold") is not None]
    if not known:
        raise refuse("grm-tables", record, "no held-out accuracy", "give --design a table with accuracy_gold")
    variant = {a.name: a for a in record.bon}
    sets = list(dict.fromkeys(name for scores in evaluated.values() for name in scores))
    text = []
    cells = grouped((variant[c] for c in dict.fromkeys(r["condition"] for r in known) if c in variant), *KEYS)
    for one, arms in cells.items():
        head = ["reward model", "seeds", "held-out pairs", *sets]
        lines = [f"**{title(one) or 'all pairs'}**", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for arm in arms:
            mine = [r for r in known if r["condition"] == arm.name]
            columns = [[r["accuracy_gold"] for r in mine]]
            columns += [[evaluated[r["rm"]][s] for r in mine if s in evaluated.get(r["rm"], {})] for s in sets]
            lines.append("| " + " | ".join([arm.variant, str(len(mine)), *map(_over_seeds, columns)]) + " |")
        text += ["\n".join(lines)]
    note = "Accuracy in percent, mean over seeds and, after +-, their standard deviation. Held-out pairs are of the "
    note += "training distribution; other columns are sets of `grm rm-eval`."
    return "\n\n".join([*text, note]) + "\n"


def _over_seeds(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" +- {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"
