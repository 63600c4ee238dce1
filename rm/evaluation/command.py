"""`grm rm-eval MODEL [MODEL...] --set NAME[:LAYOUT]=PATH ...`: reward models on evaluation sets."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from core.config import Dtype
from core.config.spelling import nearest_name
from core.data.chat import ChatTokenizer
from core.errors import DataError
from core.files import path_digest, write_json, write_table
from core.machine import code_version, package_versions
from rm.evaluation.benchmark_scores import benchmark_score
from rm.evaluation.metrics import ComparisonRow, Scored, Ties, Units, measure, paired_difference, units
from rm.evaluation.published import HEADER, chosen, compare, fetch, read_published, verdict
from rm.evaluation.published import rows as rows_of_published
from rm.evaluation.rounding import rounding
from rm.evaluation.sets import LAYOUTS, MAX_MALFORMED, Comparison, EvalSet, LabelTies, read_set
from rm.model import RewardModel
from rm.reading import Reader, Reads

SEED = 1
"""Of the bootstrap, the same for all models, so that models on the same comparisons get the same draws."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    given = [parse_set(text) for text in options.set]
    given_names = [name for name, _, _ in given]
    if repeated := sorted({name for name in given_names if given_names.count(name) > 1}):
        raise DataError(f"--set {repeated[0]} is given twice: name each set differently, as in a=PATH b=PATH")
    published = read_published(options.published) if options.published else None
    if published:
        options.models = chosen(published, options.published, options.models, sets=len(given))
    elif not options.models:
        raise DataError("no model: give its folder or hub id, or --published FILE")
    names = model_names(options.models)
    sets = [
        read_set(name, path, layout, label_ties=options.label_ties, max_malformed=options.max_malformed)
        for name, layout, path in given
    ]
    if published:
        fetch(options.models)
    results: dict[str, dict] = {}
    units_of: dict[str, dict[str, Units]] = {s.name: {} for s in sets}
    for name, path in zip(names, options.models, strict=True):
        model = RewardModel.from_pretrained(path, dtype=options.dtype, reads=options.reads, lm_head=False)
        results[name] = {"path": path, "dtype": options.dtype, "reads": model.reads, "sets": {}}
        for evalset in sets:
            rows, long = score_set(model, evalset, batch_tokens=options.batch_tokens, max_tokens=options.max_tokens,
                                   progress=f"{name}, {evalset.name}")  # fmt: skip
            if options.out:
                write_rows(options.out / name / f"{evalset.name}.parquet", rows)
            results[name]["sets"][evalset.name] = metrics_of(
                rows, evalset.layout, ties=options.ties, draws=options.bootstrap
            ) | {"too_long": long, "system_moved": system_moved(model.tokenizer, evalset.comparisons)}
            if options.dtype != "float32":
                results[name]["sets"][evalset.name]["rounding"] = rounding(model, evalset.comparisons, rows)
            units_of[evalset.name][name] = units(Scored.of(rows), evalset.layout, options.ties)
        del model  # so that two are never in memory
    lines = [
        line
        for path, result in zip(options.models, results.values(), strict=True)
        for line in (compare(published, path, result["sets"][sets[0].name]["benchmark"]) if published else ())
    ]
    report = {
        "sets": {s.name: describe(s, path) for s, (_, _, path) in zip(sets, given, strict=True)},
        "models": results,
        "differences": differences(units_of, options.bootstrap),
        "published": [asdict(line) | {"fits": line.fits} for line in lines],
        "options": {k: v for k, v in vars(options).items() if k not in ("models", "set")},
        "code": code_version(),
        "packages": package_versions(),
    }
    print(render(report))
    if lines:
        print(f"\n{_table(HEADER, rows_of_published(lines))}\n\n{verdict(lines)}")
    if options.out:
        write_json(options.out / "metrics.json", report)
        print(f"\nmetrics in {options.out / 'metrics.json'}, rewards in the folders next to it", file=sys.stderr)
    return 0 if all(line.fits for line in lines) else 1


def parse_set(text: str) -> tuple[str, str, Path]:
    """(name, layout, path) of `NAME=PATH` or `NAME:LAYOUT=PATH`; DataError on anything else."""
    head, _, path = text.partition("=")
    name, _, layout = head.partition(":")
    if not path or not re.fullmatch(r"[\w.-]+", name) or layout not in ("", "auto", *LAYOUTS):
        near = nearest_name(layout, [*LAYOUTS]) if layout else None
        raise DataError(
            f"--set {text}: write NAME=PATH or NAME:LAYOUT=PATH, the name with letters, digits, '_', '.' and '-'; "
            + (f"the layout nearest to {layout!r} is {near}" if near else f"layouts are {', '.join(LAYOUTS)}")
        )
    return name, layout or "auto", Path(path)


def model_names(paths: Sequence[str]) -> list[str]:
    """A folder name for each model: the last parts of its path, as many as are needed to make them distinct."""
    parts = [[p for p in Path(path).parts if p not in ("/", "..")] or ["model"] for path in paths]
    if len(set(map(tuple, parts))) != len(parts):
        raise DataError("a model is given twice: give each once")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["_".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"no distinct names for the models {', '.join(paths)}: move one, or link to it under another name")


def score_set(
    model: RewardModel, evalset: EvalSet, *, batch_tokens: int, max_tokens: int | None = None, progress: str = ""
) -> tuple[list[ComparisonRow], int]:
    """Rows of the set's table, and the number of comparisons that are left out as too long.

    Too long is an item with a conversation of more than `max_tokens` tokens, or more than the model has positions for.
    It is left out as a whole, because the score of an item depends on all of its responses.
    """
    limit = min(max_tokens or sys.maxsize, model.positions)
    kept = within(evalset.comparisons, model.reader, limit)
    if not kept:
        raise DataError(f"{evalset.name}: no comparison within {limit} tokens: raise --max-tokens, or omit the set")
    chats = [chat for c in kept for chat in (c.chosen, c.rejected)]
    rewards = model.score(chats, batch_tokens=batch_tokens, progress=progress).tolist()
    rows: list[ComparisonRow] = [
        {
            "id": c.id,
            "subset": c.subset,
            "item": c.item,
            "prompt_id": c.prompt_id,
            "chosen_index": c.chosen_index,
            "rejected_index": c.rejected_index,
            "label_tie": c.label_tie,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "chosen_words": len(c.chosen[-1]["content"].split()),
            "rejected_words": len(c.rejected[-1]["content"].split()),
        }
        for c, chosen, rejected in zip(kept, rewards[::2], rewards[1::2], strict=True)
    ]
    return rows, len(evalset.comparisons) - len(kept)


def within(comparisons: Sequence[Comparison], reader: Reader, limit: int) -> list[Comparison]:
    """Comparisons of the items whose conversations all have at most `limit` tokens."""
    lengths: dict[int, int] = {}  # a conversation is in several comparisons of an item
    for c in comparisons:
        for chat in (c.chosen, c.rejected):
            if id(chat) not in lengths:
                lengths[id(chat)] = sum(map(len, reader.conversation(chat)))
    long = {c.item for c in comparisons if max(lengths[id(c.chosen)], lengths[id(c.rejected)]) > limit}
    return [c for c in comparisons if c.item not in long]


def system_moved(tokenizer: ChatTokenizer, comparisons: Sequence[Comparison]) -> int:
    """Comparisons whose system turn is put before the first user turn, because the chat template has none."""
    return sum(tokenizer.moves_system(c.chosen) for c in comparisons)


def metrics_of(rows: list[ComparisonRow], layout: str, *, ties: Ties = "half", draws: int) -> dict:
    """What metrics.json has for one table: `rm.evaluation.metrics.measure`, and the scores that a benchmark defines."""
    scored = Scored.of(rows)
    return measure(rows, layout, ties=ties, draws=draws, seed=SEED) | {
        "benchmark": benchmark_score(layout, scored, units(scored, layout, ties), ties)
    }


def differences(units_of: dict[str, dict[str, Units]], draws: int) -> dict[str, dict[str, dict]]:
    """Set -> model -> accuracy minus that of the first model, for all models but the first."""
    return {
        name: {
            model: paired_difference(mine, next(iter(models.values())), draws=draws, seed=SEED)
            for model, mine in list(models.items())[1:]
        }
        for name, models in units_of.items()
    }


def describe(evalset: EvalSet, path: Path) -> dict:
    return {
        "path": path,
        "digest": path_digest(path),
        "layout": evalset.layout,
        "rows": evalset.rows,
        "comparisons": len(evalset.comparisons),
        "label_ties": evalset.label_ties,
        "malformed": evalset.malformed.lines(),
        "changed": dict(evalset.malformed.changed),
        "unread_columns": sorted(evalset.malformed.unread),
    }


def write_rows(path: Path, rows: list[ComparisonRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, rows, ComparisonRow)


def render(report: dict) -> str:
    """The report as Markdown tables, aligned for a terminal."""
    models = report["models"]
    parts = [_table(_HEADLINES, [_headline(s, m, models[m]["sets"][s]) for s in report["sets"] for m in models])]
    parts.append(
        "Intervals are 95%: w Wilson, p Wilson with prompts in place of pairs, b bootstrap over prompts. ECE of "
        "sigmoid(r_chosen - r_rejected), T its best temperature; r(words) over all responses; ties: equal rewards."
    )
    parts.append(_table(["set", "part", "n", *models], _parts(report)))
    rows = [
        [
            name,
            f"{model} - {next(iter(models))}",
            _number(d["mean"], "+.3f"),
            _interval(d, "+.3f"),
            str(d["n"]),
            str(d["differing"]),
        ]  # fmt: skip
        for name, of_set in report["differences"].items()
        for model, d in of_set.items()
    ]
    if rows:
        parts.append(_table(["set", "models", "accuracy difference", "95%, paired", "n", "differ"], rows))
    return "\n\n".join(parts + _remarks(report))


_HEADLINES = [
    "set", "model", "accuracy", "95%", "n (prompts)", "macro", "benchmark", "longest", "ECE", "T", "r(words)", "ties",
]  # fmt: skip


def _headline(name: str, model: str, m: dict) -> list[str]:
    accuracy, calibration, own = m["accuracy"], m["calibration"] or {}, m["benchmark"] or {}
    kind = {"cluster bootstrap": " b", "wilson over prompts": " p", "wilson": " w", None: ""}[accuracy["interval"]]
    bound = {"low": "<", "high": ">"}.get(str(calibration.get("bound")), "")
    return [
        name, model, _number(accuracy["mean"]), _interval(accuracy) + kind, f"{accuracy['n']} ({m['prompts']})",
        _number(m["macro_accuracy"]),
        _number(own.get("score")) + ("*" if own.get("missing") else ""), _number(m["longest_answer_accuracy"]),
        _number(calibration.get("ece")), bound + _number(calibration.get("temperature"), ".3g"),
        _number(m["length"]["pearson"], "+.2f"), str(m["reward_ties"]),
    ]  # fmt: skip


def _parts(report: dict) -> list[list[str]]:
    """Subsets, then the parts of the score that the benchmark defines."""
    rows = []
    for name in report["sets"]:
        results = [model["sets"][name] for model in report["models"].values()]
        for subset in sorted({s for m in results for s in m["subsets"]}):
            accuracies = [m["subsets"].get(subset, {}) for m in results]
            counts = sorted({a.get("n", 0) for a in accuracies})
            rows.append([name, subset, "/".join(map(str, counts)), *(_number(a.get("mean")) for a in accuracies)])
        own = [(m["benchmark"] or {}).get("parts", {}) for m in results]
        rows += [[name, f"= {part}", "", *(_number(o.get(part)) for o in own)] for part in own[0]]
    return rows


def _remarks(report: dict) -> list[str]:
    """What was left out, one line each."""
    lines = []
    for name, about in report["sets"].items():
        results = [model["sets"][name] for model in report["models"].values()]
        lines += [
            f"{name}: {model} in {result['dtype']}: {noise['changed']} of {noise['pairs']} pairs are decided otherwise "
            f"when scored one by one, and a reward moves by {noise['rms']:.2g} (rms); --dtype float32 does not round"
            for model, result in report["models"].items()
            if (noise := result["sets"][name].get("rounding"))
        ]
        lines += [f"{name}: {line}" for line in about["malformed"]]
        if about["label_ties"]:
            lines.append(f"{name}: {about['label_ties']} label ties ({report['options']['label_ties']})")
        if long := max(m["too_long"] for m in results):
            lines.append(f"{name}: up to {long} comparisons left out as too long")
        if moved := max(m["system_moved"] for m in results):
            lines.append(f"{name}: system turns of up to {moved} comparisons put before the first user turn")
        if missing := (results[0]["benchmark"] or {}).get("missing"):
            lines.append(f"{name}: * without {', '.join(missing)}")
    return ["\n".join(lines)] if lines else []


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def _interval(estimate: dict, form: str = ".3f") -> str:
    return "-" if estimate["lo"] is None else f"[{estimate['lo']:{form}}, {estimate['hi']:{form}}]"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grm rm-eval", description="Accuracy of reward models on evaluation sets.")
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="folder or hub id; accuracies are compared with those of the first"
    )
    parser.add_argument(
        "--published", type=Path, metavar="FILE", help="compare with the scores in FILE, such as "
        "configs/published.yaml: of its models that are given, or of all; the exit status is 1 where one differs by "
        "more than its tolerance",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", required=True, metavar="NAME[:LAYOUT]=PATH",
        help=f"file or folder; may be repeated. Layouts, by default detected from the columns: {', '.join(LAYOUTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="folder for metrics.json and the rewards (default: nothing is written)"
    )
    parser.add_argument("--batch-tokens", type=int, default=8192, help="padded tokens of a forward pass (%(default)s)")
    parser.add_argument("--max-tokens", type=int, help="leave out items with a longer conversation (default: the "
                        "positions of the model)")  # fmt: skip
    parser.add_argument("--ties", choices=get_args(Ties), default="half", help="how equal rewards count (%(default)s)")
    parser.add_argument("--label-ties", choices=get_args(LabelTies), default="drop", help="rows that tie (%(default)s)")
    parser.add_argument(
        "--max-malformed", type=float, default=MAX_MALFORMED, help="largest share of malformed rows (%(default)s)"
    )
    parser.add_argument("--bootstrap", type=int, default=2000, help="draws of the bootstrap over prompts (%(default)s)")
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="float32",
        help="of the weights; others than %(default)s, the default, take less memory on a GPU, but rewards then depend "
        "on what they were batched with, and the report says by how much",
    )  # fmt: skip
    parser.add_argument("--reads", choices=get_args(Reads), help="tokens that all models read (default: what each "
                        "records, or what the makers of its layout do; docs/reward-models.md)")  # fmt: skip
    return parser
