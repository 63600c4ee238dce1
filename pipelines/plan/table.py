"""A plan as text, and a plan beside what a finished run took."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from core.artefacts import read_manifest
from core.row_files import numbered_rows
from pipelines.plan.plan import Plan, StagePlan

WIDTH = 100


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"


def rows_as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def as_text(plan: Plan, *, phases: bool = False) -> str:
    """The plan for people.

    Args:
        phases: show what each stage consists of.
    """
    head = ["stage", "time", "of it start", "ranks", "memory a rank", "disk", "disk at most"]
    ran = any(stage.ran is not None for stage in plan.stages)
    rows = [head + (["cost"] if plan.price else []) + (["last run"] if ran else [])]
    for stage in plan.stages:
        rows.append(_row(plan, stage) + ([duration(stage.ran) if stage.ran is not None else ""] if ran else []))
        if phases:
            rows += [[f"    {name}", duration(seconds), *[""] * (len(rows[0]) - 2)]
                     for name, seconds in stage.phases.items()]  # fmt: skip
    left = sum(stage.times * stage.disk.left for stage in plan.stages)
    total = ["all", duration(plan.seconds), "", "", "", size(left), size(plan.peak_disk)]
    rows.append(total + ([f"{plan.cost(plan.seconds):.2f}"] if plan.price else []) + ([""] if ran else []))
    where = f" on {plan.gpus} GPU" + "s" * (plan.gpus > 1) if plan.gpus else ""
    lines = [f"plan of {plan.run}{where}", *rows_as_text(rows), ""]
    for title, notes in (("rests on", [plan.basis, *plan.notes]), ("warnings", plan.warnings)):
        if notes:
            lines.append(f"{title}:")
        for note in notes:
            lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def _row(plan: Plan, stage: StagePlan) -> list[str]:
    name = stage.name + (f" x {stage.times}" if stage.times > 1 else "")
    started = stage.rounds * (stage.before + stage.phases.get("start", 0.0))
    cells = [name, duration(stage.total), duration(started), str(stage.ranks), size(stage.memory.total)]
    cells += [size(stage.times * stage.disk.left), size(stage.disk.peak)]
    cost = plan.cost(stage.total)
    return cells + ([f"{cost:.2f}"] if cost is not None else [])


def check(plan: Plan, folder: Path) -> str:
    """Predicted and actual seconds of the finished stages of a run, and of the phases of PPO.

    Where the manifest says how long the stage took to start, its seconds are counted from the command on; else from the
    moment when the stage's own function was called, and processes and imports are left out.
    """
    rows = [["stage", "predicted", "actual", "predicted / actual"]]
    sums = [0.0, 0.0]
    for stage in plan.stages:
        manifest = read_manifest(folder / stage.name)
        if manifest is None:
            continue
        actual = manifest["seconds"]
        predicted = stage.seconds + ("seconds_start" in manifest) * stage.before
        rows.append(_compared(stage.name, predicted, actual))
        sums = [sums[0] + predicted, sums[1] + actual]
        if stage.name == "ppo":
            rows += _phases(stage, folder / "ppo" / "metrics.jsonl", actual)
        if stage.name == "rm":
            of_variants = sum(v.get("seconds", 0.0) for v in manifest["metrics"]["variants"].values())
            without_start = sum(n for name, n in stage.phases.items() if name != "start")
            rows.append(_compared("    variants, without start", without_start, of_variants))
    if len(rows) == 1:
        return f"{folder} has no finished stage"
    rows.append(_compared("all", *sums))
    return "\n".join(rows_as_text(rows))


def _compared(name: str, predicted: float, actual: float) -> list[str]:
    ratio = f"{predicted / actual:.2f}" if actual else "-"
    return [name, f"{predicted:.1f}", f"{actual:.1f}", ratio]


def _phases(stage: StagePlan, metrics: Path, total: float) -> list[list[str]]:
    steps = [row for _, row in numbered_rows(metrics)]
    rows, seen = [], 0.0
    for name, predicted in stage.phases.items():
        found = [row[f"seconds_{name}"] for row in steps if f"seconds_{name}" in row]
        if found:
            rows.append(_compared(f"    {name}", predicted, sum(found)))
            seen += sum(found)
    rest = sum(n for name, n in stage.phases.items() if name in ("start", "save"))
    return [*rows, _compared("    start and save", rest, total - seen)]
