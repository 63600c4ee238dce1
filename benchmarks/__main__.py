"""`python -m benchmarks`: measure this project against what else one could use. docs/benchmarks.md explains it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import environments, page, readme, records
from benchmarks.rows import rows
from benchmarks.runner import measure
from benchmarks.tasks import WORK
from benchmarks.workers import ROOT


def main() -> int:
    options = _options()
    known = rows()
    if options.list:
        for row in known.values():
            print(f"{row.name:12} {row.title}, against {row.theirs_name}")
        return 0
    if options.readme:
        return readme.write(ROOT / "README.md", options.out)
    if options.peers:
        _make_environments()
    results = records.read(options.out)
    chosen = options.only or list(known)
    for name in chosen:
        record = measure(known[name], options.pairs, WORK / "logs")
        results[name] = record
        ordered = {key: results[key] for key in known if key in results}
        records.write(options.out, ordered)  # after each row: an interrupted run keeps what it has
        options.out.with_suffix(".md").write_text(page.markdown(ordered))
        print(page.line(name, record), flush=True)
    print(f"written: {options.out} and {options.out.with_suffix('.md')}")
    return 1 if any("ratio" not in results[name] for name in chosen) else 0


def _make_environments() -> None:
    for environment in environments.ENVIRONMENTS:
        try:
            environment.make()
        except subprocess.CalledProcessError as error:
            print(f"peers: {environment.name} could not be made ({error}); its rows will say so", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        metavar="ROW",
        choices=list(rows()),
        help="measure these rows only; the others keep what the file of --out says of them",
    )
    add("--pairs", type=_positive, default=5, metavar="N", help="timed runs of each side (%(default)s)")
    add(
        "--out",
        type=Path,
        default=WORK / "results.json",
        metavar="FILE",
        help="JSON file, with the table beside it as .md (runs/bench/results.json)",
    )
    add("--peers", action="store_true", help="first make the peers' environments in .venv-peers/")
    add("--list", action="store_true", help="print the rows")
    add("--readme", action="store_true", help="measure nothing: write README.md's numbers from --out")
    return parser.parse_args()


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
