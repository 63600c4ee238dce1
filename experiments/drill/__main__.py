"""Kill, damage and hinder real runs at random, and see that each goes on to the same result or is refused by name.

    make drill                    # 240 cases from seed 0; N=60 SEED=1 for others
    make drill ONLY="full disk"   # one kind

The unbroken run is made once in runs/drill, and each case works on a copy of it. A drill that was stopped goes on with
the cases that have not been run. Written: experiments/drill/results.json and docs/drill.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from experiments.drill.bench import ALL, Bench
from experiments.drill.cases import KINDS, SHORT, Case, drawn, generator, short
from experiments.drill.outcome import FAILED, NOTE, Failure, Outcome
from experiments.drill.processes import ROOT, end_all
from experiments.drill.records import Journal, Record, write

RESULTS, PAGE = ROOT / "experiments" / "drill" / "results.json", ROOT / "docs" / "drill.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=240, help="about how many cases (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs", "drill"), help="folder to work in (%(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="the kinds of cases whose names contain this")
    parser.add_argument("--case", type=int, help="this case alone, and keep its files")
    parser.add_argument("--again", action="store_true", help="the cases that failed are run again")
    parser.add_argument("--short", action="store_true", help="the stage prompts alone, which takes a second or two")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--no-page", action="store_true", help="write neither results.json nor docs/drill.md")
    options = parser.parse_args(argv)
    began, bench = time.monotonic(), Bench(options.work, (SHORT,) if options.short else ALL)
    bench.make()
    unbroken = bench.digests()
    journal = Journal(bench.work / f"cases-{options.seed}-{options.number}.jsonl")
    every = (short if options.short else drawn)(options.number, options.seed)
    cases = chosen(every, options, journal)
    for done, case in enumerate(cases):
        if time.monotonic() - began > 60 * options.minutes:
            print(f"{len(cases) - done} cases are left; the same command runs them")
            break
        record = run(bench, case, options.seed, keep=options.case is not None)
        journal.add(record)
        print(line_of(record), flush=True)
    if bench.digests() != unbroken:
        print("the unbroken run itself was changed: what was compared with it means nothing", file=sys.stderr)
        return 1
    last = journal.last()
    if not options.no_page:
        command = f"make drill N={options.number} SEED={options.seed}"
        of_kind = Counter(case.kind.name for case in sorted(every, key=lambda c: KINDS.index(c.kind)))
        write(RESULTS, PAGE, journal.all, {"seed": options.seed, "drawn": of_kind}, command)
    failed = sum(record["outcome"] == FAILED for record in last.values())
    print(f"{len(last)} cases, {failed} failed")
    return 1 if failed else 0


def line_of(record: Record) -> str:
    end = f"{record['outcome']}: {record['why']}" if record["why"] else record["outcome"]
    parts = record["number"], record["kind"], record["stage"], record["what"], record["tries"], end
    return " | ".join(map(str, parts))


def chosen(cases: list[Case], options: argparse.Namespace, journal: Journal) -> list[Case]:
    """The cases that the options ask for, without those that are done."""
    last = journal.last()
    if options.case is not None:
        return [case for case in cases if case.number == options.case]
    cases = sorted(cases, key=lambda case: case.kind.long)  # of a drill that is stopped, more cases have been run
    if options.only:
        cases = [case for case in cases if options.only in case.kind.name]
    if options.again:
        return [case for case in cases if case.number in last and last[case.number]["outcome"] == FAILED]
    return [case for case in cases if case.number not in last]


def run(bench: Bench, case: Case, seed: int, *, keep: bool) -> Record:
    """One case in a folder of its own, which is deleted unless the case fails."""
    place = bench.work / f"case-{seed}-{case.number:03d}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    began = time.monotonic()
    try:
        found = case.kind.act(bench, case.stage, place, generator(case, seed))
    except Failure as error:
        what = (place / NOTE).read_text() if (place / NOTE).is_file() else ""
        found, keep = Outcome(case.stage, what, 1, FAILED, str(error)), True
    finally:
        end_all()
    if not keep:
        shutil.rmtree(place)
    return {
        "number": case.number, "kind": case.kind.name, "stage": found.stage, "what": found.what, "tries": found.tries,
        "outcome": found.outcome, "why": found.why.replace(str(place), "CASE").replace(str(bench.work), "WORK"),
        "seconds": round(time.monotonic() - began, 1), "commit": commit(),
    }  # fmt: skip


def commit() -> str:
    """Of the code, shortened; with a + where files have changed since."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = ["core", "rm", "bon", "ppo", "pipelines", "study"]
    return name + ("+" if subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode else "")


if __name__ == "__main__":
    sys.exit(main())
