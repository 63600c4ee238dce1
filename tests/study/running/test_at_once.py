"""Policies of a study at the same time: real processes of `grm`, cheap ones."""

import os

import pytest

from core import environment
from study.at_once import LOG, Share, Training, run_at_once, shares

EVERYWHERE = Share(frozenset(os.sched_getaffinity(0)), {})


def training(folder, name, *stages):
    return Training(name, folder / name, [list(stage) for stage in stages])


def output(folder, name) -> str:
    return (folder / name / LOG).read_text()


@pytest.mark.parametrize(
    ("cores", "at_once", "expected"),
    [(2, 2, [{0}, {1}]), (2, 5, [{0}, {1}]), (8, 3, [{0, 1}, {2, 3}, {4, 5}]), (4, 1, [{0, 1, 2, 3}])],
)  # fmt: skip
def test_cores_are_shared_equally(monkeypatch, cores, at_once, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert [(part.cores, part.variables) for part in shares(at_once)] == [(part, {}) for part in expected]


@pytest.mark.parametrize(
    ("seen", "at_once", "expected"),
    [(None, 2, ["0,1", "2,3"]), ("4,5,6,7", 4, ["4", "5", "6", "7"]), ("GPU-a,GPU-b,GPU-c,GPU-d", 9,
     ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]), (None, 3, ["0", "1", "2"])],
)  # fmt: skip
def test_each_policy_sees_its_own_gpus(monkeypatch, seen, at_once, expected):
    monkeypatch.setattr(environment, "num_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    parts = shares(at_once)
    assert [part.variables["CUDA_VISIBLE_DEVICES"] for part in parts] == expected and all(p.cores for p in parts)


def test_stages_run_in_order_on_the_share_of_their_policy(tmp_path, capsys):
    one = Share(frozenset(sorted(os.sched_getaffinity(0))[:1]), {})
    policies = [training(tmp_path, name, ["env"], ["config", "-c", "configs/smoke.yaml"]) for name in "abc"]
    before = os.sched_getaffinity(0)
    assert run_at_once(policies, [one, EVERYWHERE]) == 0
    for name in "abc":
        assert 0 < output(tmp_path, name).index("cores") < output(tmp_path, name).index("policy:")
    assert " 1 of " in output(tmp_path, "a") and os.sched_getaffinity(0) == before
    said = capsys.readouterr().err
    assert all(f"{name}: {stage} took" in said for name in "abc" for stage in ("env", "config"))


def test_one_that_fails_shows_why_and_no_other_is_begun(tmp_path, capsys):
    policies = [
        training(tmp_path, "bad", ["config", "-c", "absent.yaml"], ["env"]),
        training(tmp_path, "next", ["env"]),
    ]
    assert run_at_once(policies, [EVERYWHERE]) == 2
    said = capsys.readouterr().err
    assert "bad: config failed; the end of" in said and "absent.yaml" in said.split("the end of")[1]
    assert not (tmp_path / "next").exists() and "cores" not in output(tmp_path, "bad")
