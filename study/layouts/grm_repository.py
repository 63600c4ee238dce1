"""The files of the GRM repository's best-of-n (arXiv 2406.10216, rlhf/bon): proxy_score.csv and gold_score.csv.

    proxy_score.csv  of all samples: prompts (the rendered conversation), rewards, source_ids, id_ids. A sample's order
                     is its place among the rows of its id, from 1, as their step 4 counts it
    gold_score.csv   prompts, gold_rewards, source_ids, id_ids, order_ids: of the samples only that the proxy chooses
                     among the first n, for some n

They lie in a folder, or in a folder for each method (grm/, bt/) anywhere below it. Where gold covers every sample the
result is pools. Where it covers the chosen ones it is what their step 6 computes, gold of the best of the first n
samples: one draw for each n, not the mean over all subsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bon.estimators import Array, kl_bound
from bon.pools import Pools
from core.column_files import Kind, Names, first_row, pick, read_columns
from core.errors import ArtefactError
from study.layouts.by_text import Scored, codes_in, pools_by_text

PROXY, GOLD = "proxy_score.csv", "gold_score.csv"
ID = ("id_ids", "id", "prompt_id")
ORDER = ("order_ids", "order", "sample_id")
TEXT = ("prompts", "response", "text", "answer")
REWARD = {
    "proxy": ("rewards", "reward", "score", "proxy"),
    "gold": ("gold_rewards", "rewards", "reward", "score", "gold"),
}
POINTS = 48
"""Of a curve of chosen responses, at equal steps of log n."""
LOOKED_AT, ENDING = 200, 24
"""Texts of gold that are compared with the proxy's, and how many letters at their ends."""


@dataclass
class Chosen:
    """What gold of the chosen responses alone can say, as rows of a series."""

    rows: list[dict]
    """run (a method), step (n), prompt_id, proxy, gold, kl (nats) and kl_kind."""
    about: str
    """What was left out, in a sentence; empty if nothing."""


@dataclass(eq=False)
class _Method:
    name: str
    file: Path
    prompts: Names
    rewards: Array
    order: NDArray[np.int64]
    """Of a sample within its prompt, from 1."""
    gold: Array
    """NaN where it is not known."""


def grm_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Method -> its files; a gold_score.csv that is the only one counts for all."""
    proxies, golds = sorted(folder.rglob(PROXY)), sorted(folder.rglob(GOLD))
    label = lambda file: "proxy" if file.parent == folder else file.parent.name  # noqa: E731
    for files in (proxies, golds):
        names = [label(file) for file in files]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ArtefactError(
                f"{sorted(twice)[0]} has several {files[0].name} below {folder}: give one model's folder"
            )
    if not proxies or not golds:
        raise ArtefactError(f"no {GOLD if proxies else PROXY}")
    gold_of = {label(file): file for file in golds}
    shared = golds[0] if len(golds) == 1 else None
    found = {label(file): (file, gold_of.get(label(file), shared)) for file in proxies}
    if alone := [name for name, (_, gold) in found.items() if gold is None]:
        raise ArtefactError(f"no {GOLD} for {', '.join(alone)}; there is one for {', '.join(gold_of)}")
    return {name: (proxy, gold) for name, (proxy, gold) in found.items() if gold is not None}


def grm_scores(folder: Path) -> Pools | Chosen:
    methods = [_method(name, proxy, gold) for name, (proxy, gold) in grm_files(folder).items()]
    if any(np.isnan(m.gold).any() for m in methods):
        return _chosen(methods)
    return pools_by_text({str(m.file): _scored(m) for m in methods})


def _scored(method: _Method) -> Scored:
    text = _column(method.file, TEXT)
    found = read_columns(
        method.file, {"texts": (text, "digest"), "length": (text, "length"), "responses": (text, "text")}
    )
    shown = {name: name for name in method.prompts.distinct}
    return Scored(
        method.prompts, found["texts"], method.gold, {method.name: method.rewards}, found["length"], found["responses"],
        shown,
    )  # fmt: skip


def _column(file: Path, names: Sequence[str], *, needed: bool = True) -> str:
    """The first of some columns that a file has."""
    first = first_row(file)
    column = next((name for name in names if name in first), "")
    if needed and not column:
        raise ArtefactError(f"{file.name}: no column {' or '.join(names)}; it has {', '.join(first)}")
    return column


def _method(name: str, proxy_file: Path, gold_file: Path) -> _Method:
    proxy, gold = (_read(file, role) for file, role in ((proxy_file, "proxy"), (gold_file, "gold")))
    if strange := set(gold["prompt"].distinct) - set(proxy["prompt"].distinct):
        raise ArtefactError(
            f"{gold_file.name} has {len(strange)} ids that {proxy_file.name} lacks, such as {min(strange)}"
        )
    ids = proxy["prompt"].distinct
    prompts = codes_in(proxy["prompt"], ids)
    order = proxy.get("order")
    if order is None:
        order = _counted(prompts)
    if gold.get("order") is not None:
        rows = _matched((prompts, order), (codes_in(gold["prompt"], ids), gold["order"]), "order", gold_file)
        _check_texts(proxy_file, rows, gold_file)
    else:
        texts = [read_columns(f, {"t": (_column(f, TEXT), "digest")})["t"].view(np.int64)
                 for f in (proxy_file, gold_file)]  # fmt: skip
        rows = _matched((prompts, texts[0]), (codes_in(gold["prompt"], ids), texts[1]), "text", gold_file)
    values = np.full(len(prompts), np.nan)
    values[rows] = gold["score"]
    if gold.get("order") is None:
        values = _of_equal_texts(values, prompts, texts[0])
    return _Method(name, proxy_file, proxy["prompt"], proxy["score"], order, values)


def _read(file: Path, role: str) -> dict[str, Any]:
    wanted: dict[str, tuple[str, Kind]] = {"prompt": (_column(file, ID), "name")}
    wanted["score"] = (_column(file, REWARD[role]), "number")
    if order := _column(file, ORDER, needed=False):
        wanted["order"] = (order, "whole")
    return read_columns(file, wanted)


def _counted(prompts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each row among those of its prompt, from 1."""
    by_prompt = np.argsort(prompts, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(prompts))))[:-1]
    order = np.empty(len(prompts), dtype=np.int64)
    order[by_prompt] = np.arange(len(prompts)) - np.repeat(starts, np.bincount(prompts)) + 1
    return order


def _matched(left: Sequence[NDArray], right: Sequence[NDArray], what: str, file: Path) -> NDArray[np.int64]:
    """For each row of `right` the first row of `left` with the same prompt and key; ArtefactError if there is none."""
    sort = np.lexsort(left[::-1])
    keys = np.empty(len(sort), dtype=[("prompt", np.int64), ("key", np.int64)])
    wanted = np.empty(len(right[0]), dtype=keys.dtype)
    for table, columns in ((keys, (left[0][sort], left[1][sort])), (wanted, right)):
        table["prompt"], table["key"] = columns
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    if lost := int((keys[at] != wanted).sum()):
        raise ArtefactError(
            f"{lost} of {len(wanted)} rows of {file.name} are of no row of {PROXY} with the same id and {what}"
            + ("" if what == "order" else "; gold that read another template needs a column order_ids")
        )
    rows: NDArray[np.int64] = sort[at]
    return rows


def _of_equal_texts(values: Array, prompts: NDArray[np.int64], texts: NDArray[np.int64]) -> Array:
    """Gold of a text counts for every sample that is this text."""
    order = np.lexsort((texts, prompts))
    starts = np.concatenate(([True], (np.diff(prompts[order]) != 0) | (np.diff(texts[order]) != 0)))
    block = np.cumsum(starts) - 1
    known = ~np.isnan(values[order])
    gold = np.full(block[-1] + 1, np.nan)
    gold[block[known]] = values[order][known]
    filled = np.empty(len(values))
    filled[order] = gold[block]
    return filled


def _check_texts(proxy_file: Path, rows: NDArray[np.int64], gold_file: Path) -> None:
    """ArtefactError when gold's texts are not those of the proxy's rows that their ids and orders name.

    The two are renderings by two templates, which share the answer at their ends. So the letters and digits at the ends
    are compared, and must agree more than those of rows that have nothing to do with each other.
    """
    texts = [_column(file, TEXT, needed=False) for file in (proxy_file, gold_file)]
    if not all(texts):
        return
    some = np.unique(np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(int))
    mine = [_letters(text) for text in pick(proxy_file, texts[0], rows[some].tolist())]
    theirs = [_letters(text) for text in pick(gold_file, texts[1], some.tolist())]
    own = float(np.mean([_agreeing(a, b) for a, b in zip(mine, theirs, strict=True)]))
    other = float(np.mean([_agreeing(a, b) for a, b in zip(mine[1:] + mine[:1], theirs, strict=True)]))
    if own < 0.5 * ENDING and own <= 2 * other + 1:
        raise ArtefactError(
            f"{gold_file.name} and {proxy_file.name} are about other samples: {len(some)} texts of one id and order "
            f"end in {own:.1f} equal letters on average, and texts of different samples in {other:.1f}; "
            f"{proxy_file.name} may have been sorted or made again since"
        )


def _letters(text: str | None) -> str:
    """The letters and digits of a text without what templates put between < > and [ ]."""
    return "".join(c for c in re.sub(r"<[^<>\s]{1,30}>|\[/?INST\]", "", text or "") if c.isalnum())


def _agreeing(first: str, second: str) -> int:
    """How many letters at their ends agree, at most ENDING; long texts may be cut off at different places."""
    if first[-ENDING:] in second or second[-ENDING:] in first:
        return min(ENDING, len(first), len(second))
    pairs = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _chosen(methods: Sequence[_Method]) -> Chosen:
    rows: list[dict] = []
    notes = []
    for method in methods:
        curve, n = _first_n(method)
        rows += curve
        covered = np.isfinite(method.gold).mean()
        notes.append(f"{method.name}: gold of {covered:.1%} of the samples, which is all choices up to n = {n}")
    return Chosen(rows, "; ".join(notes))


def _first_n(method: _Method) -> tuple[list[dict], int]:
    """Proxy and gold of the best of the first n samples by the proxy, for n up to where gold has all of them."""
    ids = sorted(method.prompts.distinct)
    prompts = codes_in(method.prompts, ids)
    sort = np.lexsort((method.order, prompts))
    ends = np.cumsum(np.bincount(prompts, minlength=len(ids)))
    pools = np.split(sort, ends[:-1])
    best = [_running_best(method.rewards[rows]) for rows in pools]
    known = [np.isfinite(method.gold[rows[at]]) for rows, at in zip(pools, best, strict=True)]
    most = min(len(k) if k.all() else int(k.argmin()) for k in known)
    if most < 2:
        few = next(i for i, k in zip(ids, known, strict=True) if not k[:2].all())
        raise ArtefactError(
            f"{method.file}: gold lacks the best of the first {most + 1} samples of id {few}: give gold of what the "
            "proxy chooses among the first n, for n = 1, 2 and so on, or of all samples"
        )
    ns = np.unique(np.round(np.geomspace(1, most, POINTS)).astype(int))
    rows = [
        {"run": method.name, "step": int(n), "prompt_id": i, "proxy": float(method.rewards[pool[at[n - 1]]]),
         "gold": float(method.gold[pool[at[n - 1]]]), "kl": float(kl_bound(int(n))), "kl_kind": "bound"}
        for i, pool, at in zip(ids, pools, best, strict=True) for n in ns
    ]  # fmt: skip
    return rows, most


def _running_best(rewards: Array) -> NDArray[np.int64]:
    """[N]: the place of the largest of the first n, the first of equal ones."""
    new = np.concatenate(([True], rewards[1:] > np.maximum.accumulate(rewards)[:-1]))
    return np.maximum.accumulate(np.where(new, np.arange(len(rewards)), 0))


def is_grm(folder: Path) -> bool:
    return any(folder.rglob(GOLD)) and any(folder.rglob(PROXY))
