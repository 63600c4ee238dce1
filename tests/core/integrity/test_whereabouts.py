"""What ranks know of each other: who is silent, who has ended, and what is said of it."""

import json
import os
import subprocess
import sys

import pytest

from core import whereabouts
from core.errors import EXIT_LOST
from core.whereabouts import ENDED, FAILED, WAITING, Whereabouts
from tests.builders.processes import ROOT, START_RANKS


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(whereabouts, "GATHER_SECONDS", 0.3)
    made = [Whereabouts(tmp_path, rank=i, world=3, timeout=10, name=f"grm ppo, rank {i}") for i in range(3)]
    for one in made:
        one.tell(phase="train", step=4)
    return made


def test_a_rank_without_a_sign_of_life_is_silent(ranks):
    assert ranks[0].silent(100.0) == {}
    ranks[1].tell(beat=1)
    assert ranks[0].silent(109.0) == {}
    assert list(ranks[0].silent(111.0)) == [2]
    assert list(ranks[0].silent(120.0)) == [1, 2]
    ranks[2].tell(phase="sync", beat=7)
    assert list(ranks[0].silent(121.0)) == [1]
    ranks[1].tell(state=FAILED)  # it has told why itself, and the others have some time to notice
    ranks[2].tell(state=ENDED)
    assert ranks[0].silent(140.0) == {} and ranks[0].silent(149.0) == {}
    assert ranks[0].silent(151.0).keys() == {1}


def test_files_of_an_earlier_command_are_not_believed(ranks, tmp_path):
    file = tmp_path / "1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"job": "another"}))
    assert ranks[0].others()[1] is None and ranks[0].others()[2] is not None
    (tmp_path / "2.json").write_text('{"phase": ')  # half written
    assert ranks[0].others()[2] is None


def test_the_lost_ranks_are_those_that_have_ended_or_else_those_that_say_nothing(ranks, tmp_path):
    ranks[2].tell(state=WAITING)
    assert list(ranks[0].lost()) == [1]
    ended = subprocess.Popen(["true"])
    ended.wait()
    ranks[1].tell(pid=ended.pid, started=12345)
    assert list(ranks[2].lost()) == [1]
    assert whereabouts._named(ranks[2].lost()) == "rank 1 has ended in phase train of step 4"
    ranks[1].tell(host="elsewhere")
    assert whereabouts._named(ranks[2].lost()) == "rank 1 on elsewhere is lost in phase train of step 4"


def test_which_errors_come_from_another_rank():
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    wrapped = ValueError("while gathering")
    wrapped.__cause__ = gloo
    assert whereabouts.is_loss(gloo) and whereabouts.is_loss(wrapped)
    assert not whereabouts.is_loss(RuntimeError("shapes do not match")) and not whereabouts.is_loss(None)


GATHERING = """
import os, signal, sys
from pathlib import Path
from core import whereabouts
rank = int(os.environ["RANK"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ranks of stages answer it when they can
whereabouts.begin(Path(sys.argv[1]), rank=rank, world=2, timeout=6, name=f"rank {rank}")
from core.training import distributed
distributed.init_distributed()
distributed.global_sum(1.0)
whereabouts.enter("collect", 2)
if rank == 1:
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
try:
    distributed.global_sum(1.0)
except RuntimeError as error:
    assert whereabouts.is_loss(error), error
    print(whereabouts.loss(error, launched=False), file=sys.stderr)
    sys.exit(76)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [("SIGKILL", 256 - 9, "rank 1 has ended in phase collect of step 2. This rank was in phase collect of step 2."),
     ("SIGSTOP", EXIT_LOST, "rank 0: rank 1 is lost in phase collect of step 2: no sign of life for 6 s")],
)  # fmt: skip
def test_ranks_that_wait_for_one_that_is_lost_end_and_name_it(tmp_path, number, status, said):
    """Real gloo; the launcher kills the rank that is stopped."""
    (tmp_path / "program.py").write_text(GATHERING)
    done = subprocess.run(
        [sys.executable, "-c", START_RANKS, "2", str(tmp_path / "program.py"), str(tmp_path / "ranks"), number],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-3000:]
    assert said in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]


def test_a_silent_rank_is_named_before_a_collective_gives_up(tmp_path, monkeypatch):
    """Who watches looks now and then; a collective that ended first could not say who is missing and why."""
    one = Whereabouts(tmp_path, rank=0, world=2, timeout=6, name="rank 0")
    monkeypatch.setattr(whereabouts, "_mine", one)
    assert whereabouts.timeout() >= one.timeout + 2 * whereabouts.LONGEST_BEAT
