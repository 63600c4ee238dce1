"""README.md's headline numbers, made from the JSON of `benchmarks/`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import page, records
from benchmarks.machine import in_words
from benchmarks.records import Record, Results

BEGIN, END = "<!-- from benchmarks/results.json by `python -m benchmarks --readme` -->", "<!-- end -->"
PATTERN = re.compile(re.escape(BEGIN) + r"\n(.*?)" + re.escape(END), re.DOTALL)


def section(results: Results) -> str:
    """The lines between the two marks.

    Raises:
        ValueError: no row was compared.
    """
    compared = {name: record for name, record in results.items() if "ratio" in record}
    if not compared:
        raise ValueError("no row of the results has a ratio")
    lines = ["| | ours | theirs | ratio |", "| --- | ---: | ---: | ---: |"]
    lines += [_line(record) for record in compared.values()]
    machines = sorted({in_words(record["machine"]) for record in compared.values()})
    pairs = sorted({len(record["ours"]["runs"]) for record in compared.values()})
    busy = max(record["others_cpu"] or 0.0 for record in compared.values())
    lines += ["", f"{'; '.join(machines)}. Medians of {' or '.join(map(str, pairs))} pairs of alternating runs, and in "
              "brackets the lowest and the highest ratio."]  # fmt: skip
    if busy > page.QUIET:
        lines.append(f"**The machine was busy:** other programs used up to {busy:.0%} of its CPU time.")
    return "\n".join(lines) + "\n"


def _line(record: Record) -> str:
    rate = lambda side: f"{page.short(side['rate']['median'])} {record['unit']}/s"  # noqa: E731
    return f"| {record['title']} | {rate(record['ours'])} | {rate(record['theirs'])} ({record['theirs']['name']}) | " \
        f"{page.ratio(record['ratio'])} |"  # fmt: skip


def written(text: str) -> str | None:
    """What stands between the marks of README.md; None without marks."""
    found = PATTERN.search(text)
    return found and found[1]


def write(readme: Path, results: Path) -> int:
    """Replace the lines between the marks; the exit status."""
    text = readme.read_text(encoding="utf-8")
    if written(text) is None:
        print(f"{readme} has no line {BEGIN}")
        return 1
    new = PATTERN.sub(lambda _: f"{BEGIN}\n{section(records.read(results))}{END}", text)
    readme.write_text(new, encoding="utf-8")
    return 0
