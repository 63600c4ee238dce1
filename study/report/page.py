"""The report of a study, or of a run as a study of its own: one page that needs no network, and its Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from bon.gains import gains
from core import plotting
from study.checks import Check
from study.records import Results
from study.report import tables
from study.report.answers import answers
from study.report.captions import CAPTIONS, DATA, TITLES
from study.report.figures import all_figures
from study.report.overoptimisation import overoptimisation
from study.report.words import as_shown, in_words

SHOWN = 12
"""Examples of each condition and n in the sample browser."""
PLACED = ("overoptimisation", "ensembles", "ensembles_ppo", "difference")
"""Figures that stand beside what they belong to."""
REM = 6.0
"""Of the page to an inch of a figure: so texts of all figures have one size."""


@dataclass(frozen=True)
class RunExtras:
    """What the report of a run shows beside its study; tables are a head and rows of text."""

    checkpoints: list[list[str]]
    reward_models: list[list[str]]
    stages: list[list[str]]
    samples: list[dict]
    """Responses of the reference and the last policy to the same prompts."""
    packages: str
    figures: dict[str, Figure]
    """accuracy, reward_training and ppo_training."""


def write(
    out: Path, title: str, description: str, results: Results, checks: Sequence[Check], *, file: str = "study",
    accuracy: Mapping[str, float] | None = None, seconds: Sequence[tuple[str, float]] = (), config: str = "",
    run: RunExtras | None = None,
) -> None:  # fmt: skip
    """Figures, and the page and its Markdown as `file`.html and .md."""
    drawn = all_figures(results) | (run.figures if run else {})
    widths = {name: REM * figure.get_size_inches()[0] for name, figure in drawn.items()}
    svg = {name: plotting.save(figure, out / "figures", name, TITLES.get(name, name)) for name, figure in drawn.items()}
    narrow = plotting.drawn(overoptimisation(results, narrow=True))
    page = {
        "widths": widths, "theme": plotting.theme(), "answers": answers(results, checks),
        "narrow": plotting.for_page(narrow, "narrow", TITLES["overoptimisation"]),
        "title": title, "description": description, "svg": svg, "captions": CAPTIONS, "data": DATA, "run": run,
        "more": [name for name in svg if name not in PLACED and not (run and name in run.figures)],
        "conditions": tables.condition_table(results, accuracy or {}), "policies": tables.policy_table(results),
        "pooled": tables.pooled_table(results), "differences": tables.difference_table(results),
        "rules": tables.rule_table(results), "fits": tables.fit_table(results), "models": tables.model_table(results),
        "members": tables.member_table(results), "prediction": tables.prediction_table(results),
        "golds": tables.gold_table(results), "checks": list(checks), "seconds": seconds,
        "failed": [c for c in checks if not c.ok], "config": config,
        "reasons": [
            (in_words(results, n), f["verdict"].why)
            for n, f in {**results.findings, **results.policies, **results.pooled}.items()
        ],
        "samples": browser(results) if results.pools.responses else None,
    }  # fmt: skip
    (out / f"{file}.html").write_text(render(page), encoding="utf-8")
    (out / f"{file}.md").write_text(markdown(page), encoding="utf-8")


def render(page: dict) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    # A script element ends at "</", wherever it stands: responses may hold it.
    environment.filters["embedded"] = lambda x: json.dumps(x, ensure_ascii=False).replace("<", "\\u003c")
    return environment.get_template("study.html.j2").render(page)


def summary(results: Results) -> list[str]:
    """What turned and what is better, in the first sentences of the page without their full stops."""
    said = answers(results, [])
    return [sentence.rstrip(".") for sentence in (*said.turns[:3], *said.better[:2])]


def browser(results: Results) -> list[dict]:
    """For each condition's first member and some n: where the choice among the first n samples gains most of the proxy
    beyond gold, beside the sample that gold would have chosen among them."""
    pools, gold = results.pools, gains(results.pools.gold)
    assert pools.responses is not None, "the page has no browser where the pools have no texts"
    rows = []
    for name in results.conditions:
        proxy = results.proxies[name][0]
        for n in (n for n in (2, 4, 16, 64, 256) if n <= pools.size):
            picked, best = proxy[:, :n].argmax(axis=1), gold[:, :n].argmax(axis=1)
            at = np.arange(len(gold))
            gap = proxy[at, picked] - gold[at, picked]
            for p in (-gap).argsort(kind="stable")[:SHOWN].tolist():
                sides = [
                    {
                        "text": as_shown(pools.responses[p][k]),
                        "proxy": round(float(proxy[p, k]), 2),
                        "gold": round(float(gold[p, k]), 2),
                    }
                    for k in (int(picked[p]), int(best[p]))
                ]
                prompt = pools.prompts[p] if pools.prompts else pools.prompt_ids[p]
                rows.append({"rm": name, "n": n, "prompt": as_shown(prompt), "picked": sides[0], "best": sides[1]})
    return rows


def markdown(page: dict) -> str:
    """The page without its samples."""
    said = page["answers"]
    lines = [f"# {page['title']}", ""]
    for question, sentences in (("What turns, and when", said.turns), ("Which is better", said.better),
                                ("What this cannot tell", said.unknown)):  # fmt: skip
        lines += [f"**{question}.**", "", *(f"- {sentence}" for sentence in sentences), ""]
    lines += ["![gold and proxy against KL](figures/overoptimisation.png)", "", CAPTIONS["overoptimisation"], ""]
    lines += [page["description"], ""]
    lines += [f"- check failed: {c.name} ({c.detail})" for c in page["failed"]] + [""]
    titles = {
        "conditions": "Conditions", "pooled": "Policies of several seeds", "differences": "Policies compared",
        "policies": "Policies", "rules": "Rules to stop", "fits": "Fits",
        "golds": "A second gold", "models": "Reward models", "members": "Seeds of a condition",
        "prediction": "What predicts the outcome",
    }  # fmt: skip
    if run := page["run"]:
        page = page | {"checkpoints": run.checkpoints, "accuracies": run.reward_models, "stages": run.stages}
        titles = titles | {"checkpoints": "Checkpoints", "accuracies": "Held-out accuracy", "stages": "Stages"}
    for title, (head, *body) in ((title, page[t]) for t, title in titles.items()):
        if body:
            lines += [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
            lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
    return "\n".join(lines) + "\n"
