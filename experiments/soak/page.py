"""docs/soak.md and its figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from core.plotting import COLOURS, plt
from experiments.soak.watch import COUNTED, Held, growths

DOCS = Path(__file__).parents[2] / "docs"
UNITS = {"ppo": "step", "serve": "request"}
TEXT = """# Soak

Does anything grow in a long run? `make soak` runs the parts of the table below. Every two seconds it looks at what all
processes of the command hold together: memory (proportional set size, in which shared pages count once), open files and
sockets, threads, files in a folder for temporary files of the command's own, and segments of `/dev/shm` that they have
mapped. The model has two layers and random weights, so that many steps fit into minutes. The code is that of every
other run.

![What is held, over the work]({image})

| | {columns} | seconds |
| --- | {rules} | ---: |
{rows}

Each cell is the median in the second quarter of the work and in the last one. The first quarter is left out, since
caches fill in it. `make soak` fails where memory grows by more than 5% between the two, where anything that is counted
grows by more than a fifth, or where a reward that the server gives is not the one that it gave to the same request when
it had nothing else to do.

{machines}
"""


def write(found: Mapping[str, dict]) -> None:
    """The page, of the parts that were run."""
    rows = {name: [Held(**row) for row in part["rows"]] for name, part in found.items()}
    _figure(found, rows, DOCS / "images" / "soak.png")
    names = ("memory_mib", *COUNTED)
    lines = []
    for name, part in found.items():
        of = growths(rows[name])
        cells = [f"{of[n].first:.0f}, {of[n].last:.0f}" if n in of else "not counted" for n in names]
        lines.append(f"| {part['what']} | {' | '.join(cells)} | {part['seconds']} |")
        lines += [f"\n**{fault}**" for fault in part["faults"]]
    (DOCS / "soak.md").write_text(
        TEXT.format(
            image="images/soak.png",
            columns=" | ".join(["memory, MiB", *(n.replace("_", " ") for n in COUNTED)]),
            rules=" | ".join(["---:"] * len(names)), rows="\n".join(lines),
            machines="\n\n".join(f"{part['what']}: {part['machine']}." for part in found.values()),
        )
    )  # fmt: skip


def _figure(found: Mapping[str, dict], rows: Mapping[str, list[Held]], file: Path) -> None:
    figure, axes = plt.subplots(2, len(found), figsize=(4.6 * len(found), 5.4), squeeze=False, sharex="col")
    for column, (name, of) in enumerate(rows.items()):
        done = [row.done for row in of]
        memory, counts = axes[:, column]
        memory.plot(done, [row.memory_mib for row in of], color=COLOURS[0])
        memory.set_ylim(0, 1.15 * max(row.memory_mib for row in of))
        memory.set_title(found[name]["what"], fontsize=9)
        memory.set_ylabel("memory, MiB")
        counted = [held for held in COUNTED if getattr(of[0], held) is not None]
        for colour, held in zip(COLOURS[1:], counted, strict=False):
            counts.plot(done, [getattr(row, held) for row in of], color=colour, label=held.replace("_", " "))
        counts.set_ylim(0, 1.25 * max(max(getattr(row, held) for row in of) for held in counted))
        counts.set_ylabel("number")
        counts.set_xlabel(f"{UNITS[name]}s done")
        counts.legend(fontsize=8, ncols=2, loc="upper left")
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
