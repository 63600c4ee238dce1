"""Ranks as processes of this machine: their places, a rank that fails, SIGTERM."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from core.ranks import run_ranks
from tests.builders.processes import ROOT

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MINE")


def ranks(script: str, number: int, folder, *, stop_seconds: float = 20) -> int:
    environment = {**os.environ, "MINE": "kept", "WORLD_SIZE": "of some cluster"}
    return run_ranks([sys.executable, "-c", script, str(folder)], environment, number, stop_seconds=stop_seconds)


PLACE = f"""
import os, pathlib, sys
words = [os.environ[name] for name in {NAMES}]
pathlib.Path(sys.argv[1], words[0]).write_text(" ".join(words))
"""


def test_each_rank_knows_its_place_and_all_meet_at_one_port(tmp_path):
    assert ranks(PLACE, 3, tmp_path) == 0
    found = {file.name: file.read_text().split() for file in tmp_path.iterdir()}
    assert sorted(found) == ["0", "1", "2"]
    for rank, words in found.items():
        assert words[:5] == [rank, rank, "3", "3", "127.0.0.1"] and words[6] == "kept"
    assert len({words[5] for words in found.values()}) == 1


ONE_FAILS = """
import os, pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1], "ended").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
if os.environ["RANK"] == "1":
    while not pathlib.Path(sys.argv[1], "ready").exists():
        time.sleep(0.01)
    sys.exit(3)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def test_where_one_rank_fails_the_others_are_ended(tmp_path):
    began = time.monotonic()
    assert ranks(ONE_FAILS, 2, tmp_path) == 3
    assert (tmp_path / "ended").exists() and time.monotonic() - began < 30


TOLD = """
import os, pathlib, sys, time
import torch.distributed as dist
import torch
from core.ranks import told_by_first
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
time.sleep(0.3 * rank)  # the first says it before the others listen, and must not end before they have heard it
heard = [told_by_first("one", lambda: "said once"), told_by_first("two")]
if len(sys.argv) == 2:  # a process group can be made beside it, at the same port
    dist.init_process_group("gloo")
    total = torch.tensor(rank)
    dist.all_reduce(total)
    heard.append(str(int(total)))
(folder / str(rank)).write_text(" ".join(heard))
os._exit(0)
"""


def test_the_first_rank_tells_the_others(tmp_path):
    assert ranks(TOLD, 3, tmp_path) == 0
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys("012", "said once  3")


FIRST_FAILS = """
import os, sys
from core.ranks import told_by_first
def tell():
    sys.exit("what is wrong")
told_by_first("one", tell)
"""


def test_where_the_first_rank_fails_only_its_error_is_seen(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in every stage (`core.environment.variables`)
    began = time.monotonic()
    assert ranks(FIRST_FAILS, 3, tmp_path) == 1
    assert capfd.readouterr().err == "what is wrong\n" and time.monotonic() - began < 30


STOPS = """
import os, pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
rank = int(os.environ["RANK"])
pathlib.Path(sys.argv[1], f"ready-{rank}").touch()
while not asked:
    time.sleep(0.01)
time.sleep(0.3 * rank)
pathlib.Path(sys.argv[1], f"saved-{rank}").touch()
sys.exit(75)
"""
ORPHAN = """
import os, pathlib, sys, time
from core.ranks import end_with_launcher
end_with_launcher()
pathlib.Path(sys.argv[1], "rank").write_text(str(os.getpid()))
time.sleep(60)
"""
KILLED = f"""
import os, sys
from core.ranks import run_ranks
run_ranks([sys.executable, "-c", {ORPHAN!r}, sys.argv[1]], os.environ, 1, stop_seconds=20)
"""


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_ranks_end_with_the_command_that_started_them(tmp_path):
    """They would write where the next command does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment) as command:
        deadline, written = time.monotonic() + 30, tmp_path / "rank"
        while not (written.exists() and written.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        rank = int(written.read_text())
        assert is_alive(rank)
        command.kill()
    while is_alive(rank) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(rank)


DEAF = STOPS.replace("while not asked", "while True")


def stop_when_ready(folder, number: int, *signals: int) -> None:
    while len(list(folder.glob("ready-*"))) < number:
        time.sleep(0.01)
    for one in signals or [signal.SIGTERM]:
        os.kill(os.getpid(), one)
        time.sleep(0.2)


def test_sigterm_reaches_all_ranks_and_each_may_finish(tmp_path):
    threading.Thread(target=stop_when_ready, args=(tmp_path, 2), daemon=True).start()
    assert ranks(STOPS, 2, tmp_path) == 75
    assert {file.name for file in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_lets_ranks_save_as_sigterm_does(tmp_path):
    threading.Thread(target=stop_when_ready, args=(tmp_path, 2, signal.SIGINT), daemon=True).start()
    assert ranks(STOPS, 2, tmp_path) == 75
    assert {file.name for file in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_a_second_ctrl_c_ends_ranks_at_once(tmp_path):
    before, twice = signal.getsignal(signal.SIGINT), (tmp_path, 2, signal.SIGINT, signal.SIGINT)
    threading.Thread(target=stop_when_ready, args=twice, daemon=True).start()
    assert ranks(DEAF, 2, tmp_path, stop_seconds=60) == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) == before


def test_ranks_that_do_not_stop_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("core.ranks.GRACE_SECONDS", 0.2)
    threading.Thread(target=stop_when_ready, args=(tmp_path, 2), daemon=True).start()
    assert ranks(DEAF, 2, tmp_path, stop_seconds=0.3) == -signal.SIGKILL
