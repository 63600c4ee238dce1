"""`grm loop`: iterated RLHF. In each round pairs are sampled from the policy of the round before, reward models are
trained on them, and PPO goes on from that policy.

A round is a run of its own, `<run>/round-1` and so on, made of the stages that there are. So everything that reads runs
reads rounds, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from core.artefacts import read_manifest
from core.config import Config
from core.config.load import load
from core.errors import ConfigError
from pipelines import launch, stages

ROUND = ("prompts", stages.SFT, "preferences", "rm", "ppo")
"""The stages of a round; `sft` in the first one only, and only where it is configured."""
MEASURED = ("bon", "eval", "report")
"""With --measure."""


class Round(NamedTuple):
    number: int
    cfg: Config
    overrides: list[str]
    """What this round adds to the command line."""


def rounds(files: list[str], overrides: list[str], count: int) -> list[Round]:
    """The configurations of all rounds.

    Every round has the policy of the one before, and its chat options; PPO's reference is that policy too. Reward
    models begin with `rm.base` again, and gold is the same.
    """
    base, made = load(files, overrides), list[Round]()
    for number in range(1, count + 1):
        own = [f"run.name={base.run.name}/round-{number}"]
        if made:
            policy = made[-1].cfg.run_dir / "ppo" / "policy"
            own += [f"policy.path={policy}", "policy.revision=null", "sft=null"]
        made.append(Round(number, load(files, [*overrides, *own]), own))
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="grm loop", description="Rounds of preferences from the current policy, reward models, and PPO.",
        epilog="Each round is a run, named after the run of the configuration: runs/NAME/round-1 and so on.",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="config values, laid over the files")
    parser.add_argument("--config", "-c", action="append", help="YAML file; repeat to lay files over each other")
    parser.add_argument("--rounds", type=int, required=True, help="how many rounds there shall be in all")
    parser.add_argument("--measure", action="store_true", help="also run bon, eval and report in each round")
    options = parser.parse_intermixed_args(argv)
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds}: there must be at least one")
    files = options.config or ["configs/offline.yaml"]
    for one in rounds(files, options.overrides, options.rounds):
        names = [name for name in (*ROUND, *(MEASURED if options.measure else ())) if name in stages.in_use(one.cfg)]
        for name in names:
            command = [name, *(part for file in files for part in ("--config", file)), *options.overrides]
            if status := launch.bring_up_to_date(name, one.cfg, [*command, *one.overrides]):
                return status
        print(line_of(one), file=sys.stderr)
    return 0


def line_of(one: Round) -> str:
    """What a finished round shows: gold of the policy that it began with, and what PPO made of the proxy."""
    found = [_metrics(one.cfg.run_dir / name) for name in ("preferences", "ppo")]
    gold, headline = (found[0].get("gold_mean"), found[1].get("headline", ""))
    began = "" if gold is None else f"gold of its samples before PPO {gold:+.3f}; "
    return f"round {one.number} ({one.cfg.run_dir}): {began}{headline}"


def _metrics(folder: Path) -> dict:
    return (read_manifest(folder) or {}).get("metrics", {})
