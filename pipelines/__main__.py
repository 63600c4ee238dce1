"""`grm STAGE --config F [a.b=value ...]`, `grm status`, `grm config`, and the tools of reward models."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys

import yaml

from core import environment
from core.config.load import load
from core.errors import ArtefactError, ConfigError, DataError
from core.stopping import EXIT_STOPPED, Stopped
from pipelines import launch, stages

GOLD = ("prompts", "preferences", "rm")
"""The stages of `grm gold`."""

TOOLS = {
    "study": ("study.run", "a matrix of reward models, best-of-n and PPO, and what it shows"),
    "vllm-serve": ("core.generation.serve", "the policy behind a vLLM server, for ppo.vllm_servers"),
    "rm-eval": ("rm.evaluation.command", "accuracy of a reward model on benchmark files"),
    "rm-merge": ("rm.tools.merge", "the weights of reward models averaged (WARM)"),
    "rm-serve": ("rm.serving.server", "rewards over HTTP, of one model or an ensemble"),
    "rm-export": ("rm.tools.export", "a reward model as a standard transformers folder"),
}
"""Command -> (module whose `main(argv)` it is, what it does); each has options of its own, outside any run."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in TOOLS:
        return _tool(*arguments)
    options = _parser().parse_intermixed_args(arguments)  # `--config F` may stand before overrides
    try:
        default = "configs/gold.yaml" if options.command == "gold" else "configs/offline.yaml"
        files = options.config or [default]
        cfg = load(files, options.overrides)
        if options.command == "config":
            print(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        if options.command == "status":
            print(f"run {cfg.run_dir}", *stages.status(cfg), sep="\n")
            return 0
        names = GOLD if options.command == "gold" else (options.command,)
        rest = [part for file in files for part in ("--config", file)] + options.overrides
        rest += ["--force"] if options.force else []
        return next(filter(None, (_stage(name, cfg, [name, *rest], force=options.force) for name in names)), 0)
    except (ConfigError, ArtefactError, DataError) as error:
        print(f"grm: {error}", file=sys.stderr)
        return 2
    except Stopped as reason:
        stages.say(f"grm: {reason}")
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _tool(command: str, *arguments: str) -> int:
    try:
        return importlib.import_module(TOOLS[command][0]).main(list(arguments)) or 0
    except (ConfigError, ArtefactError, DataError) as error:
        print(f"grm {command}: {error}", file=sys.stderr)
        return 2


def _stage(name: str, cfg, arguments: list[str], *, force: bool) -> int:
    if environment.is_started():
        stages.say(stages.run(name, cfg, force=force))
        return 0
    changed = stages.staleness(name, cfg)
    if changed == [] and not force:
        print(f"{name}: up to date", file=sys.stderr)
        return 0
    if changed:
        print(f"{name}: runs again, because " + "; ".join(changed[:5]), file=sys.stderr)
    stages.fingerprint(stages.STAGES[name], cfg)  # missing inputs are told here, before a process is started
    distributed = stages.STAGES[name].distributed
    if distributed and (faults := cfg.batch_faults(launch.num_processes(cfg))):
        raise ConfigError("the configuration does not fit this machine:\n  " + "\n  ".join(faults))
    return launch.run_stage_process(cfg, arguments, distributed=distributed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grm",
        description="Train reward models, optimise against them, measure over-optimisation.",
        epilog="stages, in order: " + "; ".join(f"{s.name} ({s.makes})" for s in stages.STAGES.values())
        + "; tools, each with --help of its own: " + "; ".join(f"{k} ({what})" for k, (_, what) in TOOLS.items()),
    )  # fmt: skip
    parser.add_argument("command", choices=[*stages.STAGES, "gold", "status", "config"],
                        metavar="STAGE|gold|status|config", help="a stage; gold: a gold reward model from the human "
                        "preferences of configs/gold.yaml; status; config: the resolved configuration")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="config values, laid over the files")
    parser.add_argument("--config", "-c", action="append", help="YAML file; repeat to lay files over each other")
    parser.add_argument("--force", action="store_true", help="run although the stage is up to date")
    return parser


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # vLLM and DeepSpeed leave threads and process groups whose tear-down order can crash a finished stage.
    os._exit(status) if environment.is_started() else sys.exit(status)
