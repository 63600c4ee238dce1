"""Whatever goes wrong ends in one message and a status that says whose fault it is."""

import errno
import os
import shlex
import subprocess
import sys

import pytest

from core.errors import EXIT_BUSY, ArtefactError, Busy, ConfigError, DataError
from core.reporting.crash import EXIT_CRASHED
from core.stopping import EXIT_STOPPED, Stopped
from pipelines import __main__ as grm_main
from tests.builders.command_line import grm
from tests.builders.processes import ROOT

FULL = OSError(errno.ENOSPC, "No space left on device", "runs/x")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("no"), 2, "grm status: no\n"),
        (ArtefactError("no"), 2, "grm status: no\n"),
        (DataError("no"), 2, "grm status: no\n"),
        (Busy("taken"), EXIT_BUSY, "grm status: taken\n"),
        (Stopped("after step 3"), EXIT_STOPPED, "grm status: after step 3\n"),
        (KeyboardInterrupt(), 130, "grm status: interrupted; the same command goes on from what is saved\n"),
        (FULL, 2, "grm status: No space left on device: runs/x\n"),
        (KeyError("x"), EXIT_CRASHED, "grm status: KeyError: 'x'; this was not foreseen, and runs/crashes/grm-"),
        (OSError("odd"), EXIT_CRASHED, "grm status: OSError: odd; this was not foreseen, and runs/crashes/grm-"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_end_has_a_status_and_one_line(monkeypatch, tmp_path, capsys, error, status, said):
    def fails(_):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(grm_main.OVERVIEWS, "status", fails)
    assert grm("status") == status
    found = capsys.readouterr().err
    assert found.startswith(said) and found.count("\n") == 1


def test_a_rank_that_crashes_names_itself_and_exits_70(tmp_path):
    """Of a stage's own process nothing but its line is seen, and its launcher returns the same status."""
    program = (
        "import sys, pipelines.prompts as prompts\n"
        "def fails(*_): raise ZeroDivisionError('by hand')\n"
        "prompts.run = fails\n"
        "import pipelines.launch as launch, pipelines.stages as stages\n"
        "launch.check_ranks = lambda *_: None\n"
        "launch._settled = lambda *_: False\n"
        "stages.told_by_first = lambda *_: ''\n"  # there is no other rank
        "from pipelines.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    place = {"GRM_STAGE_STARTED": "2", "GRM_LAUNCHER": str(os.getpid()), "RANK": "0", "WORLD_SIZE": "2"}
    config = ROOT / "configs" / "smoke.yaml"
    (tmp_path / "p.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, "prompts", "--config", str(config),
         f"run.dir={tmp_path}", f"data.prompts={tmp_path / 'p.jsonl'}", f"policy.path={tmp_path / 'model'}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env={**os.environ, **place, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == EXIT_CRASHED and "Traceback" not in done.stderr, done.stderr
    assert "grm prompts, rank 0: ZeroDivisionError: by hand; " in done.stderr
    (file,) = (tmp_path / "runs" / "crashes").iterdir()
    assert "by hand" in file.read_text() and "rank      0 of 2" in file.read_text()


def test_a_reader_that_ends_early_is_no_fault(tmp_path):
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m pipelines config --explain | head -1", shell=True, cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.stdout.count("\n") == 1 and not done.stderr


def test_a_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    (tmp_path / "p.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "c.yaml").write_text("")
    assert grm("prompts", "--config", tmp_path / "c.yaml", f"run.dir={tmp_path / 'runs'}",
               f"data.prompts={tmp_path / 'p.jsonl'}", f"policy.path={tmp_path / 'model'}") == 2  # fmt: skip
    assert "Not a directory" in capsys.readouterr().err


def test_env_names_versions_and_machine(capsys):
    assert grm("env") == 0
    shown = capsys.readouterr().out
    assert all(f"\n{word}" in "\n" + shown for word in ("code ", "python ", "memory ", "device ", "package   torch 2"))


@pytest.mark.parametrize("command", ["runs", "study --dry-run"])
def test_a_reader_that_left_is_no_error(command):
    """As in `grm study --dry-run | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    call = [sys.executable, "-m", "pipelines", *command.split()]
    ended = subprocess.run(call, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")
