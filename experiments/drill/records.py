"""What a drill found: a line a case while it runs, then a file of JSON and a page."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from core.files import read_json, write_json
from core.machine import describe
from experiments.drill.outcome import CONTINUED, FAILED, OUTCOMES, REFUSED


class Record(TypedDict):
    number: int
    kind: str
    stage: str
    what: str
    tries: int
    outcome: str
    why: str
    seconds: float
    commit: str
    """Of the code that the case was run on."""


class Journal:
    """The records of a drill in its folder, each written when its case has ended; of a case run again, both."""

    def __init__(self, file: Path):
        self._file = file
        self.all: list[Record] = []
        if file.is_file():
            self.all = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]

    def add(self, record: Record) -> None:
        self.all.append(record)
        with self._file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def last(self) -> dict[int, Record]:
        """By the number of the case."""
        return {record["number"]: record for record in self.all}


def write(results: Path, page: Path, records: Iterable[Record], facts: Mapping[str, object], command: str) -> None:
    """Write the JSON and the page.

    Args:
        facts: what else the JSON begins with: `seed`, and `drawn`, the number of cases of each kind.
    """
    ordered = list(records)
    # Without the folder that follows "of": it says nothing of the machine.
    lines = [" ".join(line.split()) for line in describe(device=False)]
    named = ("python", "system", "cpu", "memory")
    machine = [re.sub(r" of /\S+", "", line) for line in lines if line.split()[0] in named]
    write_json(results, {**facts, "command": command, "machine": machine, "cases": ordered})
    page.write_text(text(results, command), encoding="utf-8")


def text(results: Path, command: str) -> str:
    """The page of a file of results."""
    found = read_json(results)
    last, planned = {record["number"]: record for record in found["cases"]}, found["drawn"]
    ends = Counter(record["outcome"] for record in last.values())
    lines = [
        "# Fault drill",
        "",
        "Processes of real runs are killed, stopped and started twice, files are damaged, disks fill up,",
        "permissions are taken away and clocks set back, at moments and places that a seed draws. A case is well",
        "where the same command comes to the result of a run that nothing disturbed (the same bytes, times left",
        "out), or where it is refused with one message that names the file or stage. Everything else fails:",
        "another result, a lost stage, a traceback, a hang.",
        "",
        f"`{command}` draws {sum(planned.values())} cases, and {len(last)} were run: "
        f"{ends[CONTINUED]} {CONTINUED}, {ends[REFUSED]} {REFUSED}, "
        f"{ends[FAILED]} {FAILED}.",
        "",
        "| case | stages | drawn | run | commands | " + " | ".join(OUTCOMES) + " |",
        "| --- | --- |" + " ---: |" * (3 + len(OUTCOMES)),
    ]
    for kind, number in planned.items():
        of = [record for record in last.values() if record["kind"] == kind]
        counts = Counter(record["outcome"] for record in of)
        stages = ", ".join(dict.fromkeys(record["stage"] for record in sorted(of, key=lambda r: r["number"])))
        lines.append(
            f"| {kind} | {stages} | {number} | {len(of)} | {sum(r['tries'] for r in of)} | "
            + " | ".join(str(counts[o]) for o in OUTCOMES) + " |"
        )  # fmt: skip
    return "\n".join([*lines, "", *_failures(found["cases"], last), *_setting(found)])


def _failures(records: list[Record], last: Mapping[int, Record]) -> list[str]:
    """What failed, and what failed first and has been mended."""
    lines = []
    failed = [record for record in last.values() if record["outcome"] == FAILED]
    if failed:
        lines += ["## Failed", ""] + [f"- {_line(record)}: {_plain(record['why'])}" for record in failed] + [""]
    mended = [r for r in records if r["outcome"] == FAILED and last[r["number"]]["outcome"] != FAILED]
    if mended:
        lines += ["## Failed at first, and mended", ""]
        lines += [f"- {_line(r)}, on {r['commit']}: {_plain(r['why'])}" for r in mended] + [""]
    return lines


def _line(record: Record) -> str:
    return f"case {record['number']}, {record['kind']}, {record['stage']}, {record['what']}".replace(", ,", ",")


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")[:300]


def _setting(found: Mapping) -> list[str]:
    commits = Counter(record["commit"] for record in found["cases"])
    seconds = sum(record["seconds"] for record in found["cases"])
    return [
        f"Seed {found['seed']}; {seconds / 60:.0f} minutes on {'; '.join(found['machine'])}. Commits: "
        + ", ".join(f"{commit} ({n} runs of cases)" for commit, n in commits.items())
        + ". Each case with what was done to it is in"
        " [experiments/drill/results.json](../experiments/drill/results.json).",
        "",
    ]
