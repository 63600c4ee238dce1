"""The tables of a study's report: a head and rows of text each, the same on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from study.analysis.bootstrap import Interval
from study.records import Results


def condition_table(results: Results, accuracy: Mapping[str, float]) -> list[list[str]]:
    n = next((f["n"] for f in results.findings.values()), 1)
    head = ["condition", "verdict", f"gold, best of {n}", "drop from the peak", "peak at n", "against its baseline",
            "p (Holm)", "efficiency", "harmed", "seeds", "accuracy"]  # fmt: skip
    rows = []
    for name, f in results.findings.items():
        members = [accuracy[m] for m in results.conditions.get(name, ()) if m in accuracy]
        peak = f"{f['peak_n'].mean:.0f} [{f['peak_n'].lo:.0f}, {f['peak_n'].hi:.0f}]"
        rows.append([
            name, f["verdict"].kind, str(f["gold"]), str(f["drop"]), peak,
            str(f["difference"] or ""), _p(f["difference_p_holm"]) if f["difference"] else "",
            _percent(f["efficiency"]), f"{f['harmed']:.0%}", str(f["seeds"]),
            f"{np.mean(members):.3f}" if members else "",
        ])  # fmt: skip
    return [head, *rows]


def policy_table(results: Results) -> list[list[str]]:
    head = ["policy", "step", "KL, nats", "proxy", "gold", "drop from the best step", "verdict"]
    rows = [
        [name, str(f["step"]), f"{f['kl']:.2f}", str(f["proxy"]), str(f["gold"]), str(f["drop"]), f["verdict"].kind]
        for name, f in results.policies.items()
    ]
    return [head, *rows]


def pooled_table(results: Results) -> list[list[str]]:
    """Policies of one condition and KL coefficient together, at the largest KL that all of them reach; no row where
    each has one policy."""
    head = ["policies", "seeds", "KL, nats", "proxy", "gold", "peak at KL", "drop from the peak",
            "over-optimised by themselves", "verdict"]  # fmt: skip
    rows = [
        [name, str(f["seeds"]), f"{f['kl']:.2f}", str(f["proxy"]), str(f["gold"]),
         f"{f['peak_kl'].mean:.1f} [{f['peak_kl'].lo:.1f}, {f['peak_kl'].hi:.1f}]", str(f["drop"]),
         f"{f['over_optimised']} of {f['seeds']}", f["verdict"].kind]
        for name, f in (results.pooled if any(f["seeds"] > 1 for f in results.pooled.values()) else {}).items()
    ]  # fmt: skip
    return [head, *rows]


def difference_table(results: Results) -> list[list[str]]:
    """Gold of policies less that of others."""
    head = ["policies", "less", "seeds", "at equal KL", "KL, nats", "p (Holm)", "mean up to there", "at equal step",
            "step", "as training ended", "KLs then"]  # fmt: skip
    rows = []
    for f in results.policy_differences:
        seeds = str(f["seeds"]) if f["paired"] else f"{f['seeds']} against {f['seeds_less']}, not paired"
        rows.append([
            f["policies"], f["less"], seeds, str(f["at_equal_kl"]), f"{f['kl']:.1f}", _p(f["p_holm"]),
            str(f["over_range"]), str(f.get("at_equal_step", "")), str(f.get("step", "")), str(f["at_last_step"]),
            f"{f['last_kl']:.1f}, {f['last_kl_less']:.1f}",
        ])  # fmt: skip
    return [head, *rows]


def rule_table(results: Results) -> list[list[str]]:
    head = ["policy", "rule", "step", "KL, nats", "gold", "regret"]
    rows = [
        [name, r["rule"], str(r["step"]), f"{r['kl']:.2f}", str(r["gold"]), str(r["regret"] or "")]
        for name, f in results.policies.items()
        for r in f["rules"]
    ]
    return [head, *rows]


def fit_table(results: Results) -> list[list[str]]:
    head = ["curve", "form", "alpha", "beta", "d at the peak", "gold at the peak", "error of extrapolation"]
    rows = []
    pooled = {name: facts for name, facts in results.pooled.items() if facts["seeds"] > 1}
    for name, facts in {**results.findings, **results.policies, **pooled}.items():
        if fit := facts["fit"]:
            none = "no turn-over within range"
            rows.append([
                name, fit.form, str(fit.alpha), str(fit.beta), str(fit.d_peak or none), str(fit.gold_peak or ""),
                str(fit.extrapolation_error or ""),
            ])  # fmt: skip
    return [head, *rows]


def model_table(results: Results) -> list[list[str]]:
    """Reward models one by one: what they are, agreement with gold on the pools, and what optimising them did."""
    number = lambda x, form: "" if x is None else format(getattr(x, "mean", x), form)  # noqa: E731
    columns = {
        "layers": ("layers", "d"), "parameters": ("params", ",d"), "pairs": ("pairs", "d"),
        "wrong labels": ("label_noise_realised", ".1%"), "held-out accuracy": ("accuracy_gold", ".3f"),
        "pool accuracy": ("accuracy", ".3f"), "Spearman": ("spearman", ".2f"), "Kendall": ("kendall", ".2f"),
        "Spearman in the tail": ("tail_spearman", ".2f"), "ECE": ("ece", ".3f"),
        "SD within prompts": ("sd_within", ".2f"), "gold": ("gold", "+.2f"), "drop": ("drop", "+.2f"),
    }  # fmt: skip
    known = {head: key for head, key in columns.items() if any(r.get(key[0]) is not None for r in results.rms)}
    rows = [[r["rm"], *(number(r.get(key), form) for key, form in known.values())] for r in results.rms]
    return [["reward model", *known], *rows]


def member_table(results: Results) -> list[list[str]]:
    keys = ("correlation", "error_correlation", "tail_error_correlation")
    head = ["condition", "seeds", "correlation of rewards", "of errors", "of errors in the tail"]
    return [head, *([r["rm"], str(r["members"]), *(f"{r[k]:+.2f}" for k in keys)] for r in results.members)]


def prediction_table(results: Results) -> list[list[str]]:
    head = ["number", "outcome", "rank correlation over reward models", "reward models", "conditions"]
    rows = []
    for r in results.prediction:
        bounds = f" [{r['lo']:+.2f}, {r['hi']:+.2f}]" if r["lo"] is not None else ""
        rows.append([r["metric"].replace("_", " "), r["outcome"].replace("_", " "), f"{r['spearman']:+.2f}{bounds}",
                     str(r["models"]), str(r["conditions"])])  # fmt: skip
    return [head, *rows]


def gold_table(results: Results) -> list[list[str]]:
    head = ["condition", "verdict", "by the second gold", "gold", "second gold"]
    rows = [
        [r["rm"], r["verdict"], r["second_verdict"],
         *(str(Interval(r[k], r[f"{k}_lo"], r[f"{k}_hi"])) for k in ("gold", "second"))]
        for r in results.golds
    ]  # fmt: skip
    return [head, *rows]


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _percent(i: Interval | None) -> str:
    return f"{100 * i.mean:.0f}% [{100 * i.lo:.0f}, {100 * i.hi:.0f}]" if i else ""
