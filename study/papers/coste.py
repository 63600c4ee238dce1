"""Figures of Coste et al., "Reward model ensembles help mitigate overoptimization" (2310.02743).

Their names are WCO for the worst member (min) and UWO for the mean less a weight times the variance (uwo:WEIGHT).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from study.papers.draw import cell as cell_of
from study.papers.draw import curve, finish, limits, palette, panels, refuse, title
from study.papers.read import Arm, Record
from study.report.overoptimisation import below

ALONE = "one reward model, mean over seeds"
KEYS = ("variant", "pairs", "layers", "label_noise", "kl_coef")
RULES = "set study.ensembles, such as study.ensembles=[mean,min,uwo:0.5], with study.seeds=3 or more"
POLICIES = "train policies against ensembles of the seeds: study.ppo_ensembles"


def said(rule: str | None) -> str:
    """A rule as Coste et al. call it."""
    if rule is None:
        return ALONE
    name, _, weight = rule.partition(":")
    return {"min": "WCO (min)", "uwo": f"UWO, weight {weight}"}.get(name, rule)


def ensembles(records: Sequence[Record], method: str) -> Figure:
    """Gold and proxy of each ensemble and of its members on average, a panel a condition."""
    record, name = records[0], f"coste-{method}"
    groups: dict[tuple, dict[str, Arm]] = {}
    for arm in record.arms(method):
        groups.setdefault(cell_of(arm, *KEYS), {})[said(arm.rule)] = arm
    groups = {one: members for one, members in groups.items() if members.keys() - {ALONE}}
    if not groups:
        kind = "policies against ensembles" if method == "ppo" else "ensembles"
        raise refuse(name, record, f"no {kind}", POLICIES if method == "ppo" else RULES)
    figure, axes = panels(len(groups))
    colour = palette(r for members in groups.values() for r in members if r != ALONE) | {ALONE: "0.3"}
    drawn = {}
    for axis, (one, members) in zip(axes, groups.items(), strict=True):
        for rule, arm in members.items():
            for metric, stroke in (("proxy", "--"), ("gold", "-")):
                if line := record.of(arm, method, metric):
                    drawn[rule] = curve(axis, line, colour[rule], stroke, band=metric == "gold")
        axis.set_title(title(one), fontsize=9)
    return finish(figure, axes, drawn)


def members(records: Sequence[Record]) -> Figure:
    """Gold of best-of-n at its largest n against the number of members, mean over all choices of so many seeds."""
    record = records[0]
    if not record.members:
        raise refuse("coste-members", record, "no ensembles of several sizes", RULES)
    names = list(dict.fromkeys(r["rm"] for r in record.members))
    arms = {a.name: a for a in record.bon}
    figure, axes = panels(len(names))
    colour = palette(said(r["rule"]) for r in record.members)
    drawn = {}
    for axis, name in zip(axes, names, strict=True):
        for rule in dict.fromkeys(r["rule"] for r in record.members):
            rows = [r for r in record.members if (r["rm"], r["rule"]) == (name, rule)]
            x, mean, lo, hi = (np.array([float(r[k]) for r in rows]) for k in ("members", "gold", "lo", "hi"))
            [drawn[said(rule)]] = axis.plot(x, mean, "o-", color=colour[said(rule)], markersize=4)
            axis.fill_between(x, lo, hi, color=colour[said(rule)], alpha=0.13, linewidth=0)
        axis.set_xticks(x)
        axis.set_xlabel("members", fontsize=9)
        axis.set_title(title(cell_of(arms[name], *KEYS)) if name in arms else name, fontsize=9)
    limits(axes)
    axes[0].set_ylabel(f"gold at best of {record.members[0]['n']}, SD within prompts")
    below(figure, drawn, 4)
    return figure
