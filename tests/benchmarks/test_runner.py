"""Workers over pipes, and runs in turn. The two sides are small programs that note what they do."""

import json
import sys

import pytest

from benchmarks.runner import Row, Task, measure
from benchmarks.workers import ROOT, Program, Worker, WorkerError

SIDE = """
import sys, time
sys.path.insert(0, {peers!r})
from channel import Channel, versions

channel = Channel()
job = channel.job
print("libraries print what they like")
if job.get("fails") == "start":
    raise ValueError("no such model")
runs = 0

def run():
    global runs
    runs += 1
    with open(job["diary"], "a") as diary:
        diary.write(job["name"])
    if job.get("fails") == runs:
        raise ValueError("out of memory")
    time.sleep(job["seconds"])
    print("and at any time")
    return 3

channel.serve(run, lambda: {{"runs": runs}}, versions=versions("numpy", "no-such-package"), settings={{"size": 1}})
"""


@pytest.fixture
def programs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(SIDE.format(peers=str(ROOT / "benchmarks" / "peers")))
    return [Program(str(tmp_path / f"{name}.py")) for name in ("a", "b")]


def row(programs, tmp_path, **theirs):
    diary = str(tmp_path / "diary")

    def task(runs):
        assert runs == 4  # three pairs and the warm-up
        return Task(
            {"name": "A", "diary": diary, "seconds": 0.0},
            {"name": "B", "diary": diary, "seconds": 0.05} | theirs,
            "nothing",
        )

    compare = lambda ours, theirs: [{"what": "runs", "ok": ours == theirs, "detail": f"{ours} {theirs}"}]  # noqa: E731
    return Row("toy", "A toy", "things", 1.0, *programs, "B", task, compare, "all", "nothing")


def test_runs_alternate_and_the_first_is_not_counted(programs, tmp_path):
    record = measure(row(programs, tmp_path), 3, tmp_path / "logs")
    assert (tmp_path / "diary").read_text() == "ABABABAB"
    assert len(record["ours"]["runs"]) == len(record["theirs"]["runs"]) == 3
    assert all(run["work"] == 3 for run in record["ours"]["runs"]) and record["theirs"]["seconds"]["low"] >= 0.05
    assert record["ratio"]["low"] > 1 and "error" not in record
    assert record["agreement"] == [{"what": "runs", "ok": True, "detail": "{'runs': 4} {'runs': 4}"}]
    assert record["ours"]["versions"].keys() == {"python", "numpy"} and record["inputs"] == "nothing"
    assert record["ours"]["results"] == {"runs": 4}
    json.dumps(record)


def test_a_peer_that_does_not_start_leaves_ours_measured(programs, tmp_path):
    record = measure(row(programs, tmp_path, fails="start"), 3, tmp_path / "logs")
    assert "no such model" in record["error"] and "toy-theirs.log" in record["error"]
    assert len(record["ours"]["runs"]) == 3 and "ratio" not in record


def test_a_peer_that_fails_in_the_middle_leaves_ours_measured(programs, tmp_path):
    record = measure(row(programs, tmp_path, fails=2), 3, tmp_path / "logs")
    assert "out of memory" in record["error"] and "ratio" not in record
    assert (tmp_path / "diary").read_text() == "ABABAA"


def test_a_peer_without_its_environment_says_how_to_make_it(programs, tmp_path):
    missing = programs[1]._replace(python=str(tmp_path / "bin" / "python"))
    record = measure(row([programs[0], missing], tmp_path), 3, tmp_path / "logs")
    assert "make bench PEERS=1" in record["error"] and "ours" in record


def test_ours_that_fails_is_an_error_too(programs, tmp_path):
    record = measure(row(programs[::-1], tmp_path, seconds=0.0), 3, tmp_path / "logs")
    assert "error" not in record  # both can be either side
    bad = row(programs, tmp_path)
    task = lambda runs: Task({**bad.task(runs).ours, "fails": "start"}, bad.task(runs).theirs, "")  # noqa: E731
    changed = Row(**{name: getattr(bad, name) for name in Row.__slots__} | {"task": task})
    record = measure(changed, 3, tmp_path / "logs")
    assert "no such model" in record["error"] and "ours" not in record


def test_a_worker_ends_with_its_pipe(programs, tmp_path):
    job = {"name": "A", "diary": str(tmp_path / "diary"), "seconds": 0.0}
    with Worker(programs[0], job, tmp_path / "log") as worker:
        assert worker.run()[1] == 3 and worker.check() == {"runs": 1}
        process = worker._process
    assert process.returncode == 0
    assert "libraries print what they like" in (tmp_path / "log").read_text()


def test_a_worker_that_is_too_slow_is_ended(programs, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.workers.PATIENCE", 1.0)
    slow = {"name": "A", "diary": str(tmp_path / "diary"), "seconds": 60.0}
    with pytest.raises(WorkerError), Worker(programs[0], slow, tmp_path / "log") as worker:
        worker.run()


def test_the_command_of_ranks_is_torchrun():
    command = Program("benchmarks.ours.ppo", ranks=2).command()
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[-2:] == ["-m", "benchmarks.ours.ppo"]
    peer = "benchmarks/peers/trl_ppo.py"
    assert Program(peer, "python").command() == ["python", str(ROOT / peer)]
