"""The readable table that stands beside the JSON, made from it alone."""

from __future__ import annotations

from benchmarks.machine import in_words
from benchmarks.records import Record, Results, Side
from benchmarks.statistics import Spread

QUIET = 0.1
"""Share of the CPU that others may use before a row is marked."""


def markdown(results: Results) -> str:
    """The table, and below it what each row was measured with."""
    lines = [
        "# Measured against what else one could use", "",
        "Made by `python -m benchmarks`; [docs/benchmarks.md](../docs/benchmarks.md) says how to read it. Medians, and "
        "in brackets the smallest and the largest value. A ratio is the median over pairs of neighbouring runs.", "",
        "| row | ours | theirs | ratio | reach | pairs of runs |", "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(_table_line(record) for record in results.values()), "",
    ]  # fmt: skip
    for name, record in results.items():
        lines += _section(name, record)
    return "\n".join(lines).rstrip() + "\n"


def line(name: str, record: Record) -> str:
    """One line for the terminal."""
    if "ratio" not in record:
        ours = f"ours {_rate(record, record['ours'])}; " if "ours" in record else ""
        return f"{name}: {ours}not compared: {record.get('error')}"
    apart = [check["what"] for check in record["agreement"] if not check["ok"]]
    return (
        f"{name}: ours {_rate(record, record['ours'])}, theirs {_rate(record, record['theirs'])}, ratio "
        f"{ratio(record['ratio'])}" + (f"; THE SIDES DISAGREE on {', '.join(apart)}" if apart else "") + _busy(record)
    )


def ratio(value: Spread) -> str:
    return f"{short(value['median'])}x [{short(value['low'])} to {short(value['high'])}]"


def reached(record: Record) -> bool:
    """Whether the median ratio is what the project wants to reach."""
    median = record["ratio"]["median"]
    return median >= record["reach"] if record["ratio_of"] == "faster" else median <= record["reach"]


def _table_line(record: Record) -> str:
    ours = _rate(record, record["ours"]) if "ours" in record else "failed"
    if "ratio" not in record:
        return f"| {record['title']} | {ours} | not measured | | {_reach(record)} | |"
    mark = "" if all(check["ok"] for check in record["agreement"]) else " (the sides disagree)"
    mark += " (busy machine)" if _is_busy(record) else ""
    return (
        f"| {record['title']} | {ours} | {_rate(record, record['theirs'])} | {ratio(record['ratio'])}{mark} "
        f"| {_reach(record)} | {len(record['ours']['runs'])} |"
    )


def _section(name: str, record: Record) -> list[str]:
    lines = [f"## {name}: {record['title']}", ""]
    if error := record.get("error"):
        lines += [f"**Not compared:** {error}", ""]
    lines += [f"- Inputs: {record['inputs']}."] if record["inputs"] else []
    lines += [f"- Equal on both sides: {record['same']}.", f"- Not equal: {record['differs']}."]
    for key, title in (("ours", "Ours"), ("theirs", "Theirs")):
        if side := record.get(key):
            lines.append(_side(record, title, side))  # type: ignore[arg-type]
    for check in record.get("agreement", []):
        lines.append(f"- {'Agrees' if check['ok'] else '**Disagrees**'}: {check['what']}: {check['detail']}.")
    lines += [
        f"- Machine: {in_words(record['machine'])}, {record['machine']['memory_gib']} GiB of memory.{_busy(record)}",
        f"- `{record['command']}`, {record['date']}, commit {record['commit']}, {record['seconds']:.0f} s in all.", "",
    ]  # fmt: skip
    return lines


def _side(record: Record, title: str, side: Side) -> str:
    seconds = (
        f"{short(side['seconds']['median'])} s [{short(side['seconds']['low'])} to {short(side['seconds']['high'])}]"
    )
    versions = ", ".join(f"{package} {version}" for package, version in side["versions"].items())
    settings = ", ".join(f"{key} {value}" for key, value in side["settings"].items())
    work = short(side["runs"][0]["work"])
    return f"- {title}: {side['name']}, {seconds} a run of {work} {record['unit']}; {versions}; {settings}."


def _rate(record: Record, side: Side) -> str:
    return f"{short(side['rate']['median'])} {record['unit']}/s"


def _reach(record: Record) -> str:
    """The ratio to reach, and what is missing to it."""
    wanted = f"{'' if record['ratio_of'] == 'faster' else 'at most '}{record['reach']:g}x"
    if "ratio" not in record or reached(record):
        return wanted
    return f"{wanted}, missed by {abs(record['ratio']['median'] / record['reach'] - 1):.0%}"


def _is_busy(record: Record) -> bool:
    return (record["others_cpu"] or 0.0) > QUIET


def _busy(record: Record) -> str:
    share = record["others_cpu"]
    if share is None or not _is_busy(record):
        return ""
    return f" The machine was busy: other programs used {share:.0%} of its CPU time, so speeds are too low."


def short(value: float) -> str:
    """Three digits."""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:#.3g}".rstrip(".")
