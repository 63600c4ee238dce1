"""What `grm` understands: a parser for each command, its help, and a hint for a command that does not exist."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.config.explain import shown
from core.config.fields import all_fields
from core.errors import ConfigError
from pipelines.stages import STAGES


@dataclass(frozen=True, slots=True)
class Tool:
    module: str
    """Its `main(argv)` is the tool; imported only when it is called."""
    does: str


TOOLS = {
    "init": Tool("pipelines.shipped.init", "a folder to work in: a shipped configuration, what it names, a Makefile"),
    "models": Tool("pipelines.shipped.offline_model", "the offline models, from packages that have their weights"),
    "loop": Tool("pipelines.loop", "iterated RLHF: rounds of preferences from the current policy, reward models, PPO"),
    "study": Tool("study.run", "a matrix of reward models, best-of-n and PPO, and what it shows"),
    "figure": Tool("study.papers.run", "a figure or table of a paper, from what a study has written"),
    "plan": Tool("study.plan", "seconds, memory, disk and cost of a configuration before it runs"),
    "vllm-serve": Tool("core.generation.serve", "the policy behind a vLLM server, for ppo.vllm_servers"),
    "torchrun": Tool("pipelines.torchrun", "torchrun for several nodes, without its own traceback at the end"),
    "replay": Tool("pipelines.replay", "a computation that gave NaN or infinite numbers, again, from its bundle"),
    "samples": Tool("pipelines.samples", "the responses of a PPO step, the worst or best ones first"),
    "rm-eval": Tool("rm.evaluation.command", "accuracy of reward models on published evaluation sets"),
    "audit": Tool("study.audit", "how soon a reward model is over-optimised: best-of-n by it, nothing is trained"),
    "rm-merge": Tool("rm.tools.merge", "the weights of reward models averaged (WARM)"),
    "rm-serve": Tool("rm.serving.server", "rewards over HTTP, of one model or an ensemble"),
    "rm-export": Tool("rm.tools.export", "a reward model as a folder that transformers loads"),
}
"""Commands with options of their own."""
OVERVIEWS = {
    "status": "what is up to date in a run, and what has changed",
    "config": "the resolved configuration; --explain KEY explains options",
    "runs": "the runs below a folder: stages, sizes, headline numbers",
    "diff": "what differs between two runs",
    "verify": "whether the files of runs are what their stages wrote; reads all of them",
    "clean": "what runs keep of replaced results; --yes deletes it",
    "env": "versions, machine and settings, for a report of a fault",
}
GOLD = "a gold reward model from the human preferences of configs/gold.yaml: prompts, preferences, rm"
COMMANDS = {**{s.name: s.makes for s in STAGES.values()}, "gold": GOLD, **OVERVIEWS,
            **{name: tool.does for name, tool in TOOLS.items()}}  # fmt: skip
"""Command -> what it does."""
WITH_VALUE = ("--config", "-c", "--from")
"""Options before a command that take a value."""


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The command and the other arguments; `grm --config F ppo` and `grm ppo --config F` are the same."""
    expects_value = False
    for i, argument in enumerate(arguments):
        if expects_value:
            expects_value = False
        elif argument in WITH_VALUE:
            expects_value = True
        elif not argument.startswith("-"):
            return argument, [*arguments[:i], *arguments[i + 1 :]]
    return None, list(arguments)


def help_or_error(name: str | None, rest: Sequence[str]) -> int:
    """Print what there is; ConfigError for a command that does not exist."""
    if name is None:
        print(overview())
        return 0 if {"-h", "--help"} & set(rest) else 2
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"no command {name!r}: {hint}There are {', '.join(COMMANDS)}; `grm --help` explains them")


def overview() -> str:
    lines = ["grm COMMAND [--config FILE] [a.b=value ...]", "",
             "Train reward models, optimise against them, measure over-optimisation."]  # fmt: skip
    groups = {
        "stages, in order": {**{s.name: s.makes for s in STAGES.values()}, "gold": GOLD},
        "overviews": OVERVIEWS,
        "tools": {name: tool.does for name, tool in TOOLS.items()},
    }
    for title, commands in groups.items():
        lines += ["", f"{title}:"]
        for name, does in commands.items():
            lines += textwrap.wrap(does, 100, initial_indent=f"  {name:<13}", subsequent_indent=" " * 15)
    return "\n".join([*lines, "", "`grm COMMAND --help` shows a command's options; for a stage, its files."])


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of a stage or an overview; tools have their own."""
    made = argparse.ArgumentParser(
        prog=f"grm {name}", description=COMMANDS[name][:1].upper() + COMMANDS[name][1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    default = "configs/gold.yaml" if name == "gold" else "configs/offline.yaml"
    if name in ("runs", "diff", "verify", "clean"):
        _add_folders(made, name, default)
        return made
    if name == "env":
        return made
    made.add_argument("overrides", nargs="*", metavar="a.b=value", help="configuration values, laid over the files")
    made.add_argument("--config", "-c", action=_Append, default=[default], metavar="FILE",
                      help=f"YAML file; repeat it to lay files over each other (default: {default})")  # fmt: skip
    if name == "config":
        made.add_argument("--explain", nargs="?", const="", metavar="KEY",
                          help="explain the options at and below a key, such as ppo.kl (default: all)")  # fmt: skip
    if name in STAGES or name == "gold":
        made.add_argument("--force", action="store_true", help="run although the stage is up to date")
        made.add_argument("--from", dest="source", type=Path, metavar="RUN",
                          help="a run's name or folder: link its stages that are up to date for this configuration, "
                          "and run what differs, the inputs of this stage included")  # fmt: skip
    if name in STAGES:
        made.epilog = stage_help(name)
    return made


class _Append(argparse.Action):
    """Values in order of their appearance; the first one replaces the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, "_given", None) is None:
            namespace._given = []
            setattr(namespace, self.dest, namespace._given)
        namespace._given.append(values)


def _add_folders(made: argparse.ArgumentParser, name: str, default: str) -> None:
    if name == "runs":
        made.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER",
                          help="where to look (default: %(default)s)")  # fmt: skip
    elif name == "diff":
        made.add_argument("first", type=Path, metavar="RUN", help="a run's name or folder, such as runs/offline")
        made.add_argument("second", type=Path, metavar="RUN")
    elif name == "verify":
        made.add_argument("runs", nargs="*", type=Path, metavar="RUN",
                          help="runs' names or folders; runs in folders below them are included")  # fmt: skip
        made.add_argument("--config", "-c", action=_Append, default=[default], metavar="FILE",
                          help=f"verify the run of this YAML file if no RUN is given (default: {default})")  # fmt: skip
    else:
        made.add_argument("run", nargs="?", type=Path, metavar="RUN",
                          help="a run's name or folder; runs in folders below it are included")  # fmt: skip
        made.add_argument("--config", "-c", action=_Append, default=[default], metavar="FILE",
                          help=f"clean the run of this YAML file if no RUN is given (default: {default})")  # fmt: skip
        made.add_argument("--yes", action="store_true", help="delete what is listed")


def stage_help(name: str) -> str:
    """What a stage reads and writes, and its options with their defaults."""
    stage = STAGES[name]
    inputs = [*stage.inputs, *(["sft (where the configuration has that section)"] if stage.follows_sft else [])]
    lines = [
        f"reads:  {', '.join(inputs) or 'no other stage'}; the files of {', '.join(stage.files) or 'no option'}",
        f"writes: runs/<name>/{name}/ ({stage.makes})",
        "",
        "options that decide its result (a.b=value):",
    ]
    for field in all_fields():
        if field.sections or not any(field.key == r or field.key.startswith(r + ".") for r in stage.reads):
            continue
        text = f"{field.key}={shown(field.default)}  {first_sentence(field.explanation)}"
        lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent=" " * 8, break_long_words=False)
    return "\n".join(lines)


def first_sentence(explanation: str) -> str:
    """Of what is said of an option, without its full stop."""
    return explanation.replace("\n", " ").split(". ")[0].rstrip(".:")
