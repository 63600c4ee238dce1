"""SIGTERM, SIGINT and a second command on the same stage: one line that says what became of it."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from core.config.load import load
from core.errors import EXIT_BUSY
from core.stopping import EXIT_STOPPED, MARK
from pipelines import launch, runs, stages
from tests.builders.command_line import grm
from tests.builders.processes import GRM, ROOT

HOLDS = """
import pathlib, sys, time
from core.locks import writing
with writing(pathlib.Path(sys.argv[1]), "prompts"):
    print("held", flush=True)
    time.sleep(60)
"""
SMOKE = ("--config", "configs/smoke.yaml")


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A function from the status of a rank to that of the stage, whose line is read from capsys."""
    cfg = load([ROOT / "configs" / "smoke.yaml"], [f"run.dir={tmp_path}"])

    def ends_with(status, mark=None):
        def ranks(*_, **__):
            if mark:
                (cfg.run_dir / "prompts.partial").mkdir(parents=True, exist_ok=True)
                (cfg.run_dir / "prompts.partial" / MARK).write_text(mark)
            return status

        monkeypatch.setattr(launch, "run_ranks", ranks)
        return launch.run_stage_process(cfg, ["prompts"])

    return ends_with


def test_a_rank_that_a_signal_ended_is_told_in_one_line(stage, capsys):
    assert stage(-signal.SIGTERM) == 143
    assert capsys.readouterr().err == "prompts: ended by SIGTERM; the same command goes on from what is saved\n"
    assert stage(-signal.SIGKILL) == 137
    assert "as it is where memory runs out" in capsys.readouterr().err


def test_the_mark_of_an_earlier_command_is_not_taken_for_this_ones(stage, capsys):
    """A stage that fails when it is started again must not say that it was stopped: schedulers start that once more."""
    assert stage(-signal.SIGTERM, mark="after step 3") == EXIT_STOPPED
    assert stage(1) == 1
    assert capsys.readouterr().err.count("stopped after step 3") == 1


def commands_of_children(pid: int) -> list[list[str]]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    with suppress(FileNotFoundError, ProcessLookupError):  # of a program that was run meanwhile
        return [Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in children]
    return []


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stage_that_is_stopped_while_it_starts_says_one_line(tmp_path, number, status):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("GRM_LAUNCHER", None)
    command = [*GRM, "prompts", *SMOKE, f"run.dir={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, process_group=0) as grm:
        while grm.poll() is None and not any("-u" in words for words in commands_of_children(grm.pid)):
            pass
        os.killpg(grm.pid, getattr(signal, number)) if number == "SIGINT" else grm.send_signal(signal.SIGTERM)
        said = grm.communicate(timeout=60)[1]
    assert grm.returncode == status and "Traceback" not in said
    assert len(said.splitlines()) == 1 and "the same command goes on" in said


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback():
    """Most of a short command's time goes to imports, in which nothing catches a KeyboardInterrupt."""
    command = [*GRM, "status", *SMOKE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as grm:
        while grm.poll() is None and "pydantic_core" not in Path(f"/proc/{grm.pid}/maps").read_text():
            pass
        grm.send_signal(signal.SIGINT)
        said = grm.communicate(timeout=60)[0]
    assert (grm.returncode, said) == (-signal.SIGINT, "")


def test_a_second_command_is_refused_with_status_4_and_readers_are_not(stage, tmp_path, capsys, monkeypatch):
    cfg = load([ROOT / "configs" / "smoke.yaml"], [f"run.dir={tmp_path}"])
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(cfg.run_dir)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with other:
        other.stdout.readline()
        run = (*SMOKE, f"run.dir={tmp_path}")
        assert grm("prompts", *run) == EXIT_BUSY
        assert f"prompts is being written by process {other.pid} on " in capsys.readouterr().err
        assert grm("status", *run) == 0 and grm("runs", tmp_path) == 0
        monkeypatch.setattr(stages, "staleness", lambda *_: [])
        monkeypatch.setattr(runs, "staleness", lambda *_: [])
        assert grm("prompts", *run) == 0 and "prompts: up to date" in capsys.readouterr().err
        other.kill()
