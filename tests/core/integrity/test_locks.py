"""One writer a stage: who holds a lock is named, the dead hold nothing, and readers are not asked."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from core.errors import Busy
from core.locks import Holder, start_of, writing
from core.ranks import run_ranks
from tests.builders.processes import ROOT

HOLDS = """
import pathlib, sys, time
from core.locks import writing
with writing(pathlib.Path(sys.argv[1]), "ppo"):
    print("held", flush=True)
    time.sleep(60)
"""
STARTS_A_RANK = """
import os, pathlib, sys
from core.locks import writing
from core.ranks import run_ranks
with writing(pathlib.Path(sys.argv[1]), "ppo"):
    run_ranks([sys.executable, "-c", "import time; print('held', flush=True); time.sleep(60)"], os.environ, 1,
              stop_seconds=9)
"""


def holder(run, program: str = HOLDS) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(run)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def lock_file(run):
    return run / ".grm" / "ppo.lock"


def test_a_second_process_is_told_who_writes(tmp_path):
    with holder(tmp_path) as first:
        try:
            said = f"ppo is being written by process {first.pid} on {socket.gethostname()}, since 20"
            with pytest.raises(Busy, match=said), writing(tmp_path, "ppo"):
                pytest.fail("both write")
            with writing(tmp_path, "bon"):
                pass
        finally:
            first.kill()
    with writing(tmp_path, "ppo"), writing(tmp_path, "ppo"):  # of the dead; and held by this process already
        assert json.loads(lock_file(tmp_path).read_text())["pid"] == os.getpid()
    assert lock_file(tmp_path).read_text() == ""


def test_a_holder_on_another_host_is_named_and_believed(tmp_path):
    lock_file(tmp_path).parent.mkdir()
    lock_file(tmp_path).write_text(json.dumps(Holder("node7", 123, 99, "2026-01-02 03:04:05")._asdict()))
    said = r"process 123 on node7, since 2026-01-02 03:04:05.*If it has ended there, delete .*ppo.lock"
    with pytest.raises(Busy, match=said), writing(tmp_path, "ppo"):
        pytest.fail("both write")
    lock_file(tmp_path).unlink()
    with writing(tmp_path, "ppo"):
        pass


@pytest.mark.parametrize("left", ["", "{", '{"pid": 1}', "[]", "\0" * 9])
def test_what_a_kill_left_of_the_text_locks_nobody_out(tmp_path, left):
    lock_file(tmp_path).parent.mkdir()
    lock_file(tmp_path).write_text(left)
    with writing(tmp_path, "ppo"):
        pass


def test_without_locks_of_the_file_system_the_text_is_the_lock(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    lock_file(tmp_path).parent.mkdir()
    for started, is_busy in ((start_of(os.getpid()), True), (start_of(os.getpid()) + 1, False)):
        me = Holder(socket.gethostname(), os.getpid(), started, "2026-01-02 03:04:05")
        lock_file(tmp_path).write_text(json.dumps(me._asdict()))
        if is_busy:
            with pytest.raises(Busy), writing(tmp_path, "ppo"):
                pytest.fail("both write")
        else:  # another process with the pid of a dead one
            with writing(tmp_path, "ppo"):
                pass


def test_ranks_hold_the_lock_of_a_command_that_was_killed(tmp_path):
    """Until they have ended, nobody else may write where they do."""
    with holder(tmp_path, STARTS_A_RANK.replace("time.sleep(60)", "time.sleep(3)")) as command:
        command.kill()
        command.wait()
        said = f"process {command.pid} on .*, which has ended; its ranks still end"
        with pytest.raises(Busy, match=said), writing(tmp_path, "ppo"):
            pytest.fail("both write")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with writing(tmp_path, "ppo"):
                return
        except Busy:
            time.sleep(0.1)
    pytest.fail("the lock was never given back")


def test_what_ranks_leave_running_holds_nothing(tmp_path):
    """A helper of a library that outlives its rank must not lock the run."""
    lingers = "import os, time; os.fork() or (time.sleep(30), os._exit(0))"
    with writing(tmp_path, "ppo"):
        assert run_ranks([sys.executable, "-c", lingers], os.environ, 1, stop_seconds=9) == 0
    with writing(tmp_path, "ppo"):
        pass


def test_an_error_gives_the_lock_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), writing(tmp_path, "ppo"):
            raise ZeroDivisionError
