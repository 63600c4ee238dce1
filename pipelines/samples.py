"""`grm samples RUN [--step 40] [--worst | --best] [--n 5] [--json]`: what a policy answered in a step of PPO.

It reads `ppo/rollouts/` of a run, also while the stage runs. Responses come in the order in which they were sampled,
or sorted by a column.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.artefacts import partial_of
from core.data.rows import RolloutRow
from core.errors import ArtefactError, ConfigError
from core.files import read_table
from pipelines import runs
from ppo.measured.rollouts import FOLDER, tables

NUMBERS = ("proxy", "reward", "kl", "n_tokens", "advantage_mean", "reward_model", "reward_function", "reward_url")
"""Columns that responses can be sorted by, and that are shown of each; `kl` is computed here."""
WIDEST = 110


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    step, file = table_of(runs.folder_of(options.run), options.step)
    rows = [with_kl(row) for row in read_table(file, RolloutRow)]
    chosen = ordered(rows, options.by, worst=options.worst, best=options.best)[: options.n]
    if options.json:
        for row in chosen:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    which = f"the {len(chosen)} {'worst' if options.worst else 'best'} by {options.by}, " if _sorts(options) else ""
    print(f"step {step} of {file.parent.parent}: {which}{len(rows)} responses, {_range(rows, options.by)}")
    for number, row in enumerate(chosen, 1):
        print("", *shown(row, number, width), sep="\n")
    return 0


def table_of(run: Path, step: int | None) -> tuple[int, Path]:
    """The step and its table, the last one where `step` is None; of an unfinished stage, if there is one.

    Raises:
        ArtefactError: the run has none, or none of this step.
    """
    folder = run / "ppo"
    unfinished = tables(partial_of(folder) / FOLDER)
    found = unfinished or tables(folder / FOLDER)
    if not found:
        raise ArtefactError(
            f"{folder / FOLDER}: no rollouts; stage ppo keeps them while ppo.keep_rollouts_mib is above 0, and runs of "
            "earlier versions have samples.jsonl"
        )
    step = max(found) if step is None else step
    if step not in found:
        raise ArtefactError(
            f"{folder / FOLDER} has no step {step}: it has {min(found)} to {max(found)}. A larger "
            "ppo.keep_rollouts_mib keeps more"
        )
    return step, found[step]


def with_kl(row: RolloutRow) -> dict[str, Any]:
    """A row and its KL from the reference in nats: the sum of log pi - log pi_0 over its tokens (k1)."""
    pairs = zip(row["logprobs"], row["ref_logprobs"], strict=True)
    return {**row, "kl": sum(ours - theirs for ours, theirs in pairs)}


def ordered(rows: Sequence[dict[str, Any]], by: str, *, worst: bool, best: bool) -> list[dict[str, Any]]:
    """As they were sampled, or by a column, the lowest first for the worst.

    Raises:
        ConfigError: the table has no such column.
    """
    if by not in rows[0]:
        raise ConfigError(f"--by {by}: this run's rollouts have {', '.join(n for n in NUMBERS if n in rows[0])}")
    return sorted(rows, key=lambda row: row[by], reverse=best) if worst or best else list(rows)


def shown(row: dict[str, Any], number: int, width: int) -> list[str]:
    """A response as lines of a terminal: its numbers, the last turn of the prompt, the response."""
    numbers = "  ".join(f"{name} {row[name]:.4g}" for name in NUMBERS if name in row)
    cut = "" if row["finished"] else "  (cut off)"
    turns = len(row["prompt"]) - 1
    earlier = f" (after {turns} earlier message{'s' * (turns > 1)})" if turns else ""
    return [
        f"#{number}  {numbers}{cut}",
        *_wrapped(f"prompt {row['prompt_id']}{earlier}: {row['prompt'][-1]['content']}", width),
        *_wrapped(f"response: {row['response']}", width),
    ]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns. Control characters, which a response can have, must not reach a terminal."""
    lines = []
    for line in text.split("\n"):
        plain = "".join(c if c.isprintable() else " " for c in line)
        lines += textwrap.wrap(plain, width, initial_indent="  ", subsequent_indent="    ") or [""]
    return lines


def _sorts(options: argparse.Namespace) -> bool:
    return options.worst or options.best


def _range(rows: Sequence[dict[str, Any]], by: str) -> str:
    values = [row[by] for row in rows]
    return f"{by} {min(values):.4g} to {max(values):.4g}, mean {sum(values) / len(values):.4g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grm samples", description="The responses of a step of PPO, in a terminal.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's name or folder, such as runs/offline")
    parser.add_argument("--step", type=int, help="the step (default: the last one that is kept)")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--worst", action="store_true", help="those with the lowest reward first")
    order.add_argument("--best", action="store_true", help="those with the highest reward first")
    parser.add_argument("--by", default="proxy", choices=NUMBERS, help="what to sort by (default: %(default)s)")
    parser.add_argument("--n", type=_positive, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each, with all columns")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number
