"""`grm torchrun OPTIONS -- STAGE ...`: torchrun for several nodes, whose end is a line and the status of a rank.

torchrun itself ends with a traceback of its own and status 1, whatever the ranks have said.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from pipelines.launch import ended_by
from pipelines.stages import STAGES


def main(argv: list[str] | None = None) -> int:
    """The status of the first rank of this node that failed, 0 if all went well."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="grm torchrun", usage="%(prog)s [OPTION OF TORCHRUN ...] -- STAGE [--config FILE] [a.b=value ...]",
        description="Run a stage on the ranks of several nodes. `torchrun --help` lists the options before the --.",
    )  # fmt: skip
    parser.add_argument("stage", choices=[stage.name for stage in STAGES.values() if stage.distributed])
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    wants_help = {"-h", "--help"} & set(arguments[:cut])
    parser.parse_args(["--help"] if wants_help else arguments[cut + 1 : cut + 2])
    return _run([*arguments[:cut], "-m", "pipelines", *arguments[cut + 1 :]])


def _run(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it logs what the ranks say themselves
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"grm torchrun: rank {rank} was {ended_by(-failure.exitcode)}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as ended:
        print(f"grm torchrun: {ended_by(ended.sigval)}", file=sys.stderr)
        return 128 + int(signal.Signals(ended.sigval))
    return 0
