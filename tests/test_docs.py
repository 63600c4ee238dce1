"""The documentation is true: its commands run or parse, its code does what it says.

Commands that are cheap are run, in a folder with two small runs. Commands that train, serve or install are parsed: make
targets by `make -n`, everything else by the parser that the command itself uses. The configuration that they name is
loaded with their overrides.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.artefacts import publish
from core.config.load import load
from pipelines import __main__ as command_line
from pipelines import stages
from tests.builders.pages import PACKAGES, PAGES, ROOT, blocks, commands, words_of
from tests.builders.processes import make

COMMANDS = list(commands())
CHEAP = {"config", "status", "runs", "diff", "verify", "env"}
CONFIGS = {"study": "configs/study.yaml", "gold": "configs/gold.yaml"}
"""Command -> the configuration that it loads when none is named; configs/offline.yaml for the others."""


@pytest.fixture(scope="session")
def workplace(policy_path, tmp_path_factory) -> Path:
    """A folder with the repository's files, in which a stage of two runs is finished."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "data", "models", "docs"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        for overrides in ([], ["run.name=kl01", "ppo.kl.coef=0.1"]):
            cfg = load(["configs/offline.yaml"], overrides)
            partial = cfg.run_dir / "prompts.partial"
            partial.mkdir(parents=True)
            made = stages.fingerprint(stages.STAGES["prompts"], cfg)
            metrics = {"headline": "made up"}
            publish(partial, cfg.run_dir / "prompts", "prompts", made, seed=1, seconds=1.0, metrics=metrics)
    return folder


class Parsed(BaseException):
    """A command line was understood; its options are the argument. No Exception, which commands report themselves."""


@pytest.fixture
def parse(monkeypatch, capsys) -> Callable:
    """Calls a program up to the point where its own parser has read the words; its options, or a failed test.

    With `mention` the words may lack arguments: a page speaks of the command.
    """
    real = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args

    def called(program: Callable[[], object], *, mention: bool = False) -> argparse.Namespace | None:
        with monkeypatch.context() as patch:
            for read in real:

                def stop(self, args=None, namespace=None, read=read):
                    raise Parsed(read(self, args, namespace))

                patch.setattr(argparse.ArgumentParser, read.__name__, stop)
            try:
                status = program()
                assert not (isinstance(status, int) and status), capsys.readouterr().err
            except Parsed as found:
                return found.args[0]
            except SystemExit as end:
                message = capsys.readouterr().err
                assert not end.code or (mention and "arguments are required" in message), message
        return None

    return called


@pytest.fixture
def check(parse, monkeypatch, request) -> Callable[[list[str]], None]:
    """Fails where the words are no command of this project, or one that goes wrong."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def command(words: list[str]) -> None:
        name, rest = words[0].removeprefix(".venv/bin/"), words[1:]
        if name == "make":
            make_target(rest)
        elif name == "grm":
            grm(rest)
        elif name == "torchrun":
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_args(rest)
            assert options.module and options.training_script == "pipelines"
            grm(options.training_script_args)
        elif name == "python" and rest[:2] == ["-m", "pipelines"]:
            grm(rest[2:])
        elif name == "python" and rest[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in rest[2:] if "/" in word), rest
        elif name == "python":
            start = runpy.run_module if rest[0] == "-m" else runpy.run_path
            monkeypatch.setattr(sys, "argv", rest[1:] if rest[0] == "-m" else rest)
            parse(lambda: start(sys.argv[0], run_name="__main__"))
        else:
            assert os.access(ROOT / words[0], os.X_OK), f"no {words[0]}: add its package to the extra `dev`"

    def make_target(words: list[str]) -> None:
        """The targets exist, the variables are read somewhere, and the recipes call `grm` with words that it knows."""
        read = (ROOT / "Makefile").read_text() + (ROOT / "scripts" / "setup.sh").read_text()
        for variable in (word.partition("=")[0] for word in words if "=" in word):
            assert re.search(rf"\b{variable}\b", read), f"neither the Makefile nor scripts/setup.sh reads {variable}"
        options = [] if words == ["help"] else ["-n"]
        for recipe in re.findall(r"\.venv/bin/grm ([^;&|\n]*)", make(*options, *words).stdout):
            grm(shlex.split(recipe), run=False)

    def grm(words: list[str], *, run: bool = True) -> None:
        if run and (words[0] in CHEAP or {"--help", "-h", "--dry-run"} & set(words)):
            monkeypatch.chdir(request.getfixturevalue("workplace"))
            try:
                status = command_line.main(words)
            except SystemExit as end:  # of --help, with 0
                status = end.code
            assert not status, words
            return
        options = vars(parse(lambda: command_line.main(words), mention=len(words) == 1) or argparse.Namespace())
        if "overrides" in options:
            files = options.get("config") or [CONFIGS.get(words[0], "configs/offline.yaml")]
            load(files, options["overrides"])

    return command


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command(command, check):
    check(words_of(command.text))


def test_commands_are_seen():
    """What a reader would type is among the commands above."""
    seen = " ".join(command.text for command in COMMANDS)
    for name in ("make rm ppo eval", "make test-fast", "grm ppo", "grm study", "grm rm-eval", "torchrun", "python -m"):
        assert name in seen
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(
    "text",
    [
        "make no-such-target",
        "make rm COLOUR=red",
        "make ppo SET=ppo.kl.coeff=1",
        "grm paint",
        "grm ppo --colour red",
        "grm rm --config configs/none.yaml",
        ".venv/bin/grm ppo --config configs/offline.yaml ppo.kl.coeff=1",
        "grm config ppo.kl.coeff=1",
        "torchrun --nproc-per-node 2 -m pipelines paint",
        "python -m benchmarks.reward_step --colour red",
        ".venv/bin/no-such-program all",
    ],
)
def test_a_wrong_command_fails(text, check):
    with pytest.raises((AssertionError, ValueError)):
        check(words_of(text))


@pytest.mark.parametrize("block", [b for p in PAGES for b in blocks(p) if b.language == "yaml"], ids=str)
def test_yaml_is_a_configuration(block, tmp_path):
    (tmp_path / "page.yaml").write_text(block.text)
    load([ROOT / "configs" / "offline.yaml", tmp_path / "page.yaml"])


def test_exercises_of_the_tour_print_what_they_say():
    tour = [block for block in blocks(ROOT / "docs" / "tour.md") if block.text.strip()]
    pairs = [(a, b) for a, b in zip(tour, tour[1:], strict=False) if (a.language, b.language) == ("python", "text")]
    assert len(pairs) == sum(block.language == "python" for block in tour) >= 3
    for code, output in pairs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code.text, str(code), "exec"), {})
        assert printed.getvalue().strip() == output.text.strip()


@pytest.mark.slow
def test_examples_of_contributing_work(tmp_path):
    """The edits apply to a copy of the code, the tests beside them pass there, and ruff has nothing to say."""
    for name in (*PACKAGES, "examples", "tests", "configs", "Makefile", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    files = []
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        if block.language == "diff":
            apply = ["git", "apply", "-"]
            done = subprocess.run(apply, cwd=tmp_path, input=block.text + "\n", capture_output=True, text=True)
            assert done.returncode == 0, f"{block}: {done.stderr}"
        elif block.language == "python":
            name, _, text = block.text.partition("\n")
            files.append(name.removeprefix("# "))
            (tmp_path / files[-1]).write_text(text + "\n")
    tests = [name for name in files if name.startswith("tests/")]
    assert len(tests) == 5
    ruff = Path(sys.executable).with_name("ruff")
    for step in (
        [sys.executable, "-m", "pytest", "-q", *tests],
        [ruff, "check", "."],
        [ruff, "format", "--check", "."],
    ):
        settings = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(step, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
