"""The report of a study: `study.html`, one page that needs no network, and `study.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np

from bon.analysis import gains
from bon.bootstrap import Interval
from pipelines import figures
from pipelines.study_checks import Check
from pipelines.study_figures import all_figures
from pipelines.study_results import Results

SHOWN = 12
"""Examples of each condition and n in the sample browser."""
CAPTIONS = {
    "overoptimisation": "Solid: gold. Dashed: proxy, in the same unit. Bands: gold, 95% for the whole curve, over "
    "seeds and prompts. Grey: n above a quarter of the pool. The KL of best-of-n is a bound and that of PPO is "
    "measured: compare within a panel, not across.",
    "conditions": "An ensemble is one model, so its interval is over prompts alone; the others' are over seeds too.",
    "gold_against_proxy": "On the diagonal a gain of the proxy is real; what lies below it is its own. Dotted: PPO.",
    "gold_by_proxy": "Mean gold of the reference's samples by quantile of the proxy.",
    "win_rate": "How often the chosen response beats a sample of the reference by gold, and the ceiling of any proxy.",
    "length": "Left: length of what is chosen. Right: gold of choosing by proxy, the longest, or at random.",
    "harm": "Gold gain prompt by prompt.",
}
DATA = {"conditions": "conditions.csv", "gold_by_proxy": "tail.csv", "harm": "per_prompt.csv"}
"""File of a figure's numbers, where that is not curves.csv."""


def write(
    out: Path, title: str, asked: str, found: Results, checks: Sequence[Check], *,
    accuracy: Mapping[str, float] | None = None, seconds: Sequence[tuple[str, float]] = (), config: str = "",
) -> None:  # fmt: skip
    """Figures, page and Markdown."""
    svg = {name: figures.save(figure, out / "figures", name) for name, figure in all_figures(found).items()}
    page = {
        "title": title, "asked": asked, "svg": svg, "captions": CAPTIONS, "data": DATA,
        "conditions": condition_table(found, accuracy or {}), "policies": policy_table(found),
        "rules": rule_table(found), "fits": fit_table(found), "checks": [c for c in checks], "seconds": seconds,
        "failed": [c for c in checks if not c.ok], "config": config, "summary": summary(found),
        "reasons": [(n, f["verdict"].why) for n, f in {**found.found, **found.policies}.items()],
        "samples": browser(found) if found.pools.responses else None,
    }  # fmt: skip
    (out / "study.html").write_text(render(page), encoding="utf-8")
    (out / "study.md").write_text(markdown(page), encoding="utf-8")


def render(page: dict) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    # A script element ends at "</", wherever it stands: responses may hold it.
    environment.filters["embedded"] = lambda x: json.dumps(x, ensure_ascii=False).replace("<", "\\u003c")
    return environment.get_template("study.html.j2").render(page)


def summary(found: Results) -> list[str]:
    """How many conditions have which verdict."""
    kinds: dict[str, list[str]] = {}
    for name, facts in {**found.found, **found.policies}.items():
        kinds.setdefault(facts["verdict"].kind, []).append(name)
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items()]


def condition_table(found: Results, accuracy: Mapping[str, float]) -> list[list[str]]:
    n = next(iter(found.found.values()))["n_trusted"]
    head = ["condition", "verdict", "seeds", "accuracy", f"gold, best of {n}", "against its baseline",
            "efficiency", "harmed",
            "peak at n", "drop from the peak"]  # fmt: skip
    rows = []
    for name, f in found.found.items():
        members = [accuracy[m] for m in found.conditions.get(name, ()) if m in accuracy]
        rows.append([
            name, f["verdict"].kind, str(f["seeds"]), f"{np.mean(members):.3f}" if members else "", str(f["gold"]),
            str(f["difference"] or ""), _percent(f["efficiency"]), f"{f['harmed']:.0%}",
            f"{f['peak_n'].mean:.0f} [{f['peak_n'].lo:.0f}, {f['peak_n'].hi:.0f}]", str(f["drop"]),
        ])  # fmt: skip
    return [head, *rows]


def policy_table(found: Results) -> list[list[str]]:
    head = ["policy", "step", "KL, nats", "proxy", "gold", "drop from the best step", "verdict"]
    rows = [
        [name, str(f["step"]), f"{f['kl']:.2f}", str(f["proxy"]), str(f["gold"]), str(f["drop"]), f["verdict"].kind]
        for name, f in found.policies.items()
    ]
    return [head, *rows]


def rule_table(found: Results) -> list[list[str]]:
    head = ["policy", "rule", "step", "KL, nats", "gold", "regret"]
    rows = [
        [name, r["rule"], str(r["step"]), f"{r['kl']:.2f}", str(r["gold"]), str(r["regret"] or "")]
        for name, f in found.policies.items()
        for r in f["rules"]
    ]
    return [head, *rows]


def fit_table(found: Results) -> list[list[str]]:
    head = ["curve", "form", "alpha", "beta", "d at the peak", "gold at the peak", "error of extrapolation"]
    rows = []
    for name, facts in {**found.found, **found.policies}.items():
        if fit := facts["fit"]:
            none = "no turn-over within range"
            rows.append([
                name, fit.form, str(fit.alpha), str(fit.beta), str(fit.d_peak or none), str(fit.gold_peak or ""),
                str(fit.extrapolation_error or ""),
            ])  # fmt: skip
    return [head, *rows]


def _percent(i: Interval | None) -> str:
    return f"{100 * i.mean:.0f}% [{100 * i.lo:.0f}, {100 * i.hi:.0f}]" if i else ""


def browser(found: Results) -> list[dict]:
    """For each condition's first member and some n: where the choice among the first n samples gains most of the proxy
    beyond gold, beside the sample that gold would have chosen among them."""
    pools, gold = found.pools, gains(found.pools.gold)
    rows = []
    for name in found.conditions:
        proxy = found.proxies[name][0]
        for n in (n for n in (2, 4, 16, 64, 256) if n <= pools.size):
            picked, best = proxy[:, :n].argmax(axis=1), gold[:, :n].argmax(axis=1)
            at = np.arange(len(gold))
            gap = proxy[at, picked] - gold[at, picked]
            for p in (-gap).argsort(kind="stable")[:SHOWN].tolist():
                sides = [
                    {
                        "text": pools.responses[p][k],
                        "proxy": round(float(proxy[p, k]), 2),
                        "gold": round(float(gold[p, k]), 2),
                    }
                    for k in (int(picked[p]), int(best[p]))
                ]
                prompt = pools.prompts[p] if pools.prompts else pools.prompt_ids[p]
                rows.append({"rm": name, "n": n, "prompt": prompt, "picked": sides[0], "best": sides[1]})
    return rows


def markdown(page: dict) -> str:
    """The page without its samples."""
    lines = [
        f"# {page['title']}",
        "",
        page["asked"],
        "",
        "![gold and proxy against KL](figures/overoptimisation.png)",
        "",
    ]
    lines += [CAPTIONS["overoptimisation"], ""] + [f"- {s}" for s in page["summary"]] + [""]
    lines += [f"- check failed: {c.name} ({c.detail})" for c in page["failed"]] + [""]
    tables = ("conditions", "policies", "rules", "fits")
    for name, (head, *body) in ((t, page[t]) for t in tables):
        if body:
            lines += [f"## {name.capitalize()}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
            lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
    return "\n".join(lines) + "\n"
