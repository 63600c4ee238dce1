"""Best-of-n scores and RL series of other tools, as `bon.pools.Pools` and series. No model is run.

gold_labelled_gens  rows of one prompt: instruction, input, answers [N], gold_scores [N], and a list of N numbers for
                    each proxy (Coste et al. 2310.02743, whose own file has gold only)
grm                 a folder with proxy_score.csv and gold_score.csv of all samples (the GRM repository)
rewardbench         results of each item, as RewardBench's programs write them; gold is whether an answer is right
table               one file of a row a sample: prompt_id, sample_id, gold and a column a proxy; or our own stage `bon`;
                    gold2, if present, is a second gold

Rows are joined by id, never by position: where a layout has no ids, texts are the ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bon.pools import Pools, from_tables
from core.errors import ArtefactError
from core.files import digest, read_rows
from study.cells import Cells
from study.design import Condition
from study.rewardbench import rewardbench_pools, rewardbench_rows

LAYOUTS = ("gold_labelled_gens", "grm", "rewardbench", "table")
NO_PROXY = {
    "prompt_id",
    "sample_id",
    "gold",
    "gold2",
    "prompt",
    "response",
    "n_tokens",
    "length",
    "logp",
    "logp_sampler",
}
KLS = ("kl_rb", "kl_k1", "kl_k3", "kl")
"""Columns of a KL in nats, the best estimate first."""


def read_scores(path: Path, layout: str = "auto") -> Pools:
    """Pools of a file or folder; ArtefactError names the file, the rows and what to do."""
    path = Path(path)
    if not path.exists():
        raise ArtefactError(f"--scores: no file or folder {path}")
    if layout == "auto":
        layout = _recognise(path)
    if layout not in LAYOUTS:
        raise ArtefactError(f"{path}: no layout {layout!r}; known are {', '.join(LAYOUTS)}")
    readers = {
        "gold_labelled_gens": _gold_labelled_gens, "grm": _grm, "rewardbench": rewardbench_pools, "table": _table
    }  # fmt: skip
    try:
        return readers[layout](path)
    except ArtefactError as error:
        raise ArtefactError(f"{path} (read as {layout}): {error}") from None


def read_series(path: Path) -> list[dict]:
    """Rows of an RL series, by run and step: run, step, prompt_id, proxy, gold, kl (nats), kl_kind, all else kept.

    Raises:
        ArtefactError: missing columns, numbers that are not finite, the same run, step, prompt and sample twice.
    """
    rows = read_rows(Path(path))
    kl = next((c for c in KLS if c in rows[0]), None)
    missing = [c for c in ("run", "step", "prompt_id", "proxy", "gold") if c not in rows[0]]
    if missing or kl is None:
        missing += [] if kl else [f"one of {', '.join(KLS)}"]
        raise ArtefactError(f"{path}: no column {', '.join(missing)}; a row is one sample of one checkpoint")
    kind = {"kl_rb": "rb", "kl_k1": "k1", "kl_k3": "k3"}.get(kl, str(rows[0].get("kl_kind", "as given")))
    found, seen = [], set()
    for number, row in enumerate(rows, start=1):
        cells = Cells(row, number)
        try:
            numbers = {c: cells.real(c) for c in ("proxy", "gold", *(c for c in KLS if c in row or c == kl))}
            ids = {"run": cells.identity("run"), "prompt_id": cells.identity("prompt_id"), "step": cells.whole("step")}
            sample = cells.identity("sample_id") if "sample_id" in row else "0"
        except ArtefactError as error:
            raise ArtefactError(f"{path}, {error}") from None
        key = (ids["run"], ids["step"], ids["prompt_id"], sample)
        if key in seen:
            raise ArtefactError(f"{path}, row {number}: run, step, prompt and sample {key} occur twice")
        seen.add(key)
        found.append({**row, **numbers, **ids, "kl": numbers[kl], "kl_kind": kind})
    return sorted(found, key=lambda r: (str(r["run"]), r["step"]))


def _recognise(path: Path) -> str:
    if path.is_dir():
        return "grm" if (path / "gold_score.csv").is_file() else "table"
    if rewardbench_rows(path) is not None:
        return "rewardbench"
    return "gold_labelled_gens" if {"answers", "gold_scores"} <= read_rows(path)[0].keys() else "table"


def _gold_labelled_gens(path: Path) -> Pools:
    rows = read_rows(path)
    lists = [k for k, v in rows[0].items() if isinstance(v, list) and k not in ("answers", "gold_scores")]
    if not lists:
        raise ArtefactError("no proxy: add a column of as many scores as there are answers, proxy_scores for example")
    samples: list[dict] = []
    scores: dict[str, list[dict]] = {"gold_scores": [], **{name: [] for name in lists}}
    for number, row in enumerate(rows, start=1):
        cells = Cells(row, number)
        text = cells.text("instruction")
        if row.get("input"):
            text = f"{text}\n\n{cells.text('input')}"
        prompt_id, answers = digest(text), cells.texts("answers")
        for name, column in scores.items():
            values = cells.reals(name)
            if len(values) != len(answers):
                raise ArtefactError(f"row {number} has {len(answers)} answers and {len(values)} {name}")
            column += [{"prompt_id": prompt_id, "sample_id": k, "score": score} for k, score in enumerate(values)]
        samples += [
            {"prompt_id": prompt_id, "sample_id": k, "prompt": _chat(text), "response": answer}
            for k, answer in enumerate(answers)
        ]
    gold = scores.pop("gold_scores")
    return from_tables(_with_length(samples), gold, {_short(name): column for name, column in scores.items()})


def _grm(path: Path) -> Pools:
    """Both files with id, response (or another text column) and a score; samples are named by their order within a
    prompt only where the texts of both files agree, which `join` checks."""
    tables = {}
    for name in ("gold", "proxy"):
        file = path / f"{name}_score.csv"
        if not file.is_file():
            raise ArtefactError(f"no {file.name}")
        tables[name] = _grm_rows(file)
    proxy, gold = tables["proxy"], tables["gold"]
    if len(gold) < len(proxy):
        raise ArtefactError(
            f"gold_score.csv has {len(gold)} rows and proxy_score.csv {len(proxy)}: gold of selected responses alone "
            "gives one noisy draw; score the whole pool with gold"
        )
    samples = [{k: v for k, v in row.items() if k != "score"} for row in proxy]
    strip = lambda rows: [{k: r[k] for k in ("prompt_id", "sample_id", "score", "response")} for r in rows]  # noqa: E731
    return from_tables(_with_length(samples), strip(gold), {"proxy": strip(proxy)})


def _grm_rows(file: Path) -> list[dict]:
    rows: list[dict] = []
    counts: dict[str, int] = {}
    for number, row in enumerate(read_rows(file), start=1):
        name = lambda *names: next((row[n] for n in names if row.get(n) not in (None, "")), None)  # noqa: B023, E731
        prompt_id, text, score = (
            name("id", "prompt_id"),
            name("response", "text", "answer"),
            name("reward", "score", "rewards"),
        )
        if prompt_id is None or text is None or score is None:
            raise ArtefactError(f"{file.name} row {number}: needs id, response and reward; has {', '.join(row)}")
        cells = Cells({"id": prompt_id, "response": text, "reward": score, "order": name("sample_id", "order")}, number)
        try:
            identity = cells.identity("id")
            counts[identity] = counts.get(identity, -1) + 1
            order = counts[identity] if cells.values["order"] is None else cells.whole("order")
            row = {"prompt_id": identity, "sample_id": order, "score": cells.real("reward")}
            rows.append({**row, "response": cells.text("response")})
        except ArtefactError as error:
            raise ArtefactError(f"{file.name} {error}") from None
    return rows


def _table(path: Path) -> Pools:
    if path.is_dir():
        scores = {f.stem: read_rows(f) for f in sorted((path / "scores").glob("*.parquet"))}
        if "gold" not in scores or len(scores) < 2 or not (path / "samples.parquet").is_file():
            raise ArtefactError("a folder holds samples.parquet, scores/gold.parquet and scores/PROXY.parquet")
        gold, second = scores.pop("gold"), scores.pop("gold2", None)
        try:
            return from_tables(read_rows(path / "samples.parquet"), gold, scores, second)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ArtefactError(
                f"its tables are not like those of stage bon ({type(error).__name__}: {error})"
            ) from None
    rows = read_rows(path)
    if missing := [c for c in ("prompt_id", "sample_id", "gold") if c not in rows[0]]:
        raise ArtefactError(f"no column {', '.join(missing)}; it has {', '.join(rows[0])}")
    proxies = [c for c in rows[0] if c not in NO_PROXY and _is_number(rows[0][c])]
    if not proxies:
        raise ArtefactError("no proxy: every further column of numbers is one")
    cells = [Cells(row, number) for number, row in enumerate(rows, start=1)]
    ids = [{"prompt_id": row.identity("prompt_id"), "sample_id": row.whole("sample_id")} for row in cells]
    samples: list[dict] = [dict(i) for i in ids]
    for sample, row in zip(samples, cells, strict=True):
        if "response" in rows[0]:
            sample["response"] = row.text("response")
        if "prompt" in rows[0]:
            sample["prompt"] = row.prompt("prompt")
        for name, to in (("n_tokens", "n_tokens"), ("length", "n_tokens"), ("logp", "logp_sampler"),
                         ("logp_sampler", "logp_sampler")):  # fmt: skip
            if name in rows[0]:
                sample[to] = row.real(name)
    column = lambda c: [{**i, "score": row.real(c)} for i, row in zip(ids, cells, strict=True)]  # noqa: E731
    second = column("gold2") if "gold2" in rows[0] else None
    return from_tables(_with_length(samples), column("gold"), {c: column(c) for c in proxies}, second)


def _with_length(samples: Sequence[dict]) -> list[dict]:
    """Characters stand for length where tokens are not known."""
    if not samples or "n_tokens" in samples[0] or "response" not in samples[0]:
        return list(samples)
    return [{**s, "n_tokens": len(s["response"])} for s in samples]


def _chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _short(name: str) -> str:
    for affix in ("proxy_scores_", "proxy_score_"):
        name = name.removeprefix(affix)
    return "proxy" if name in ("proxy_scores", "proxy_score") else name.removesuffix("_scores")


def _is_number(value: Any) -> bool:
    try:
        float(value)  # CSV has texts only
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def by_seed(names: Sequence[str]) -> dict[Condition, list[str]]:
    """Conditions of other tools' proxies: names that differ in `-seed3`, `_seed3` or `.s3` at their end only are seeds
    of one. Such names are all that their files say of the design."""
    groups: dict[Condition, list[str]] = {}
    for name in names:
        groups.setdefault(Condition(re.sub(r"[-_.]s(?:eed)?[-_]?\d+$", "", name)), []).append(name)
    return groups


def condition_of_run(run: str, conditions: Iterable[Condition]) -> Condition | None:
    """The condition whose name an RL run of other tools begins with, the longest one."""
    return max((c for c in conditions if run.startswith(c.name)), key=lambda c: len(c.name), default=None)
