"""The fault drill: a short one on a real stage, and that it sees what it is made to see."""

import json
import random
import signal
import subprocess
import sys

import pytest

from core.artefacts import Fingerprint, open_partial, publish
from core.files import write_json, write_jsonl
from experiments.drill.bench import differences
from experiments.drill.breaking import HOWS, damage, pick
from experiments.drill.cases import KINDS, drawn, generator
from experiments.drill.outcome import FAILED, Failure, quiet, refused, sound
from experiments.drill.processes import HUNG, Command, Ended
from experiments.drill.records import Journal, text
from tests.builders.processes import ROOT, SEED


@pytest.mark.slow
def test_a_short_drill_of_a_real_stage(policy_path, tmp_path):
    """Real processes of `grm prompts`, `grm status` and others, killed, damaged and hindered at drawn places."""
    command = [sys.executable, "-m", "experiments.drill", "--short", "--number", "12", "--seed", str(SEED),
               "--work", str(tmp_path / "drill"), "--no-page"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert "12 cases, 0 failed" in done.stdout


def test_a_seed_draws_the_same_cases_and_every_kind():
    first, again, other = drawn(240, 0), drawn(240, 0), drawn(240, 1)
    assert first == again != other
    assert len(first) >= 200 and {case.kind for case in first} == set(KINDS)
    assert {case.stage for case in first if case.kind.name == "kill -9"} >= {"preferences", "rm", "bon", "ppo", "study"}
    assert generator(first[3], 0).random() == generator(again[3], 0).random() != generator(first[4], 0).random()
    assert {case.kind for case in drawn(1, 0)} == set(KINDS)


@pytest.mark.parametrize(
    ("ended", "complaint"),
    [
        (Ended("grm rm", HUNG, "rm: 3/4"), "hung"),
        (Ended("grm rm", 1, "Traceback (most recent call last):\nKeyError: 3"), "traceback"),
        (Ended("grm rm", 70, "grm rm: KeyError; this was not foreseen, and x has"), "crashed"),
        (Ended("grm rm", 0, "rm: done"), "status 0, not 2"),
        (Ended("grm rm", 2, "grm rm: a file is damaged; run `grm rm --force`"), "names none of model.safetensors"),
        (Ended("grm rm", 2, "grm rm: model.safetensors is damaged"), "does not say what to do"),
        (Ended("grm rm", 2, "grm rm: model.safetensors; `grm rm --force`\nW0101 sock.c:3 lost"), "1 lines besides"),
    ],
)
def test_what_is_no_refusal_by_name_is_a_failure(ended, complaint):
    with pytest.raises(Failure, match=complaint):
        refused(ended, ["model.safetensors"])


def test_a_refusal_by_name_is_none():
    said = "rm:  50%|### | 1/2\ngrm rm: damaged files:\n  model.safetensors is empty\n`grm rm --force` makes it again"
    refused(Ended("grm rm", 2, said), ["model.safetensors"])
    sound(Ended("grm rm", 0, ""))
    quiet(Ended("grm ppo", 75, "ppo: stopped after step 1; the same command continues"))


def finished(folder, reward: float, seconds: float, name="model.bin"):
    """A stage's folder with a table, a log and weights."""
    fingerprint = Fingerprint({"rm": {"seed": 1}})
    partial = open_partial(folder, fingerprint)
    (partial / name).write_bytes(b"weights")
    write_jsonl(partial / "train.jsonl", [{"step": 1, "loss": reward, "seconds_total": seconds}])
    write_json(partial / "about.json", {"mean": reward, "parts": [{"seconds": seconds}]})
    (partial / "curve.csv").write_text(f"n,gold,train_seconds\n1,{reward},{seconds}\n")
    metrics = {"headline": "done", "reward": reward}
    publish(partial, folder, "rm", fingerprint, seed=1, seconds=seconds, metrics=metrics)
    return folder


def test_results_are_equal_up_to_times(tmp_path):
    first = finished(tmp_path / "a" / "rm", 0.5, 10.0)
    assert differences(first, finished(tmp_path / "b" / "rm", 0.5, 99.0)) == []
    changed = differences(first, finished(tmp_path / "c" / "rm", 0.25, 10.0))
    assert changed == [f"{name} differs" for name in ("about.json", "curve.csv", "manifest.json", "train.jsonl")]
    renamed = differences(first, finished(tmp_path / "d" / "rm", 0.5, 10.0, name="other.bin"))
    assert renamed == ["model.bin is missing", "other.bin is extra"]


@pytest.mark.parametrize("how", HOWS)
def test_damage_is_damage_and_names_the_file(tmp_path, how):
    folder = finished(tmp_path / "rm", 0.5, 1.0)
    (folder / "more.bin").write_bytes(b"other weights")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    file = folder / "model.bin"
    what, changed = damage(file, [folder / "more.bin"], how, random.Random(SEED))
    after = {p: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}
    differing = {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert what and differing == {*changed}
    assert pick(list(before), random.Random(1)) in before


def test_a_command_is_killed_with_what_it_started(tmp_path):
    """Children in sessions of their own, too: torchrun and vLLM start such."""
    command = Command.__new__(Command)
    command.__init__(["--help"], tmp_path / "log")
    assert command.end(60).status == 0 and "stages, in order" in command.log.read_text()
    assert command.pids() == []
    sleeper = subprocess.Popen(["sleep", "60"], env={"GRM_DRILL": command._mark}, start_new_session=True)
    assert command.pids() == [sleeper.pid]
    command.kill_all()
    assert sleeper.wait(10) == -signal.SIGKILL


def test_the_page_counts_a_case_once_and_keeps_what_was_mended(tmp_path):
    journal = Journal(tmp_path / "cases.jsonl")
    case = {"number": 0, "kind": "full disk", "stage": "ppo", "what": "3 KiB are left", "tries": 1,
            "outcome": FAILED, "why": "a traceback", "seconds": 2.0, "commit": "abc"}  # fmt: skip
    journal.add(case)
    journal.add(case | {"outcome": "refused by name", "why": "", "tries": 2, "commit": "def"})
    journal.add(case | {"number": 1, "outcome": FAILED, "why": "hung"})
    (tmp_path / "cases.jsonl").open("a").write('{"number": 2, "ki')  # killed while it wrote
    journal = Journal(tmp_path / "cases.jsonl")
    assert len(journal.all) == 3 and journal.last()[0]["outcome"] == "refused by name"
    write_json(
        tmp_path / "r.json",
        {"seed": 5, "drawn": {"full disk": 3, "kill -9": 2}, "machine": ["python 3"], "cases": journal.all},
    )
    page = text(tmp_path / "r.json", "make drill")
    assert "draws 5 cases, and 2 were run: 0 continued to the same result, 1 refused by name, 1 failed." in page
    assert "| full disk | ppo | 3 | 2 | 3 | 0 | 1 | 1 |" in page and "| kill -9 |  | 2 | 0 | 0 | 0 | 0 | 0 |" in page
    assert "## Failed at first" in page and "on abc: a traceback" in page and ": hung" in page
    assert json.loads((tmp_path / "r.json").read_text())["seed"] == 5
