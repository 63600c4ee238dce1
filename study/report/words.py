"""Conditions and policies of a study in words: what they differ in, and nothing that all of them share."""

from __future__ import annotations

import unicodedata

from study.design import Condition
from study.records import Results

MOST_SHOWN = 4000
"""Characters of a prompt or a response on a page. A policy that over-optimises may write anything."""
MOST_MARKS = 4
"""Combining characters on one letter: more of them would cover the lines above and below."""


def in_words(results: Results, name: str) -> str:
    """A condition, an ensemble or policies by name, such as "grm, 128 pairs, 25% wrong labels"; other names
    (baselines, runs of unknown conditions) stay as they are."""
    facts = {**results.policies, **results.pooled}.get(name)
    if facts is None:
        return of_condition(results, results.designs[name]) if name in results.designs else name
    condition = results.designs.get(facts.get("condition") or "")
    words = of_condition(results, condition) if condition else name
    coefs = {f["kl_coef"] for f in results.policies.values()}
    if len(coefs) > 1 and facts["kl_coef"] is not None:
        words += f", KL coefficient {facts['kl_coef']:g}"
    return words


def of_condition(results: Results, condition: Condition) -> str:
    """A condition of the study; of an ensemble, its rule first."""
    return ", ".join(filter(None, (of_variant(condition), of_sizes(results, condition))))


def of_variant(condition: Condition) -> str:
    """How it was trained and combined."""
    if condition.rule:
        return f"the {condition.rule} of {condition.combined} {condition.variant}"
    return condition.variant


def of_sizes(results: Results, condition: Condition) -> str:
    """Size, data and noise, as far as conditions of the study differ in them."""
    others = [results.designs[name] for name in results.conditions]
    varies = {key for key in ("pairs", "layers", "label_noise") if len({getattr(o, key) for o in others}) > 1}
    parts = [f"{condition.pairs or 'all'} pairs"] if "pairs" in varies else []
    parts += [f"{condition.layers or 'all'} layers"] if "layers" in varies else []
    if "label_noise" in varies:
        parts.append(f"{condition.label_noise:.0%} wrong labels" if condition.label_noise else "clean labels")
    return ", ".join(parts)


def coefficients(results: Results) -> list[float]:
    """The KL coefficients that policies were trained with, ascending."""
    return sorted({f["kl_coef"] for f in results.policies.values() if f["kl_coef"] is not None})


def of_cell(cell: tuple) -> str:
    """A cell of the matrix."""
    pairs, layers, noise = cell
    parts = [f"{pairs} pairs"] if pairs else []
    parts += [f"{layers} layers"] if layers else []
    parts += [f"noise {noise:g}"] if noise else []
    return ", ".join(parts) or "all pairs"


def optimised_by(results: Results) -> tuple[str, str]:
    """What policies were made by, and the word before their reward model. Series whose KL is the bound of best-of-n are
    not of PPO: other tools have gold of what the first n gave alone (`study.layouts.grm_repository`)."""
    bounds = {c.kl_kind for c in results.curves if c.method == "ppo"} == {"bound"}
    return ("Best of the first n", "by") if bounds else ("PPO", "against")


def as_shown(text: str) -> str:
    """A prompt or response for a page, without what would hide the rest of it; the page's template escapes it."""
    kept: list[str] = []
    marks = hidden = 0
    for character in text[:MOST_SHOWN]:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > MOST_MARKS:
            hidden += 1
        else:
            kept.append(character)
    left_out = hidden + max(0, len(text) - MOST_SHOWN)
    return "".join(kept) + (f" [{left_out:,} characters are not shown]" if left_out else "")
