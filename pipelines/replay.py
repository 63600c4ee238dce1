"""`grm replay BUNDLE`: a computation that gave NaN or infinite numbers, once more.

The bundle is the folder that the message of the stopped stage names. It holds what the computation read and the trained
weights. Other weights are read from the base model and the reward models of the run. The computation runs in this
process alone, in plain PyTorch, with the number types of the run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from core.errors import ArtefactError
from core.training.bundles import read_bundle

NOT_SEEN = 1
"""Exit status where all numbers are finite this time."""


def main(argv: list[str] | None = None) -> int:
    """Print what was found; 0 where the fault is seen again, else `NOT_SEEN`."""
    parser = argparse.ArgumentParser(
        prog="grm replay", description="Run a computation that gave NaN or infinite numbers again.",
        epilog=f"Exit status 0: the fault is seen again. {NOT_SEEN}: all numbers are finite this time.",
    )  # fmt: skip
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder in faults/ of a run")
    bundle = read_bundle(parser.parse_args(argv).bundle)
    if bundle.about["stage"] == "ppo":
        from ppo.faults import replay
    elif bundle.about["stage"] == "rm":
        from rm.faults import replay
    else:
        raise ArtefactError(f"a bundle of stage {bundle.about['stage']!r} is of a newer version")
    print(f"then:  {bundle.about['said']}")
    seen, lines = replay(bundle)
    print(*(f"now:   {line}" for line in lines), sep="\n")
    print("seen again" if seen else "not seen again: other kernels, another machine, or a fault of memory or hardware")
    sys.stdout.flush()
    return 0 if seen else NOT_SEEN
