"""The seconds of a stage, and garbage collection while it starts."""

import gc

import pytest

from core import starting


@pytest.fixture
def clock(monkeypatch):
    """Time as the test says it; nothing has begun."""
    now = {"time": 100.0}
    monkeypatch.setattr(starting.time, "monotonic", lambda: now["time"])
    monkeypatch.setattr(starting, "_began", 100.0)
    monkeypatch.setattr(starting, "_working", None)
    yield lambda seconds: now.update(time=100.0 + seconds)
    gc.unfreeze()


def test_the_seconds_of_a_stage_begin_with_its_command(clock):
    clock(12)
    starting.working()
    clock(20)
    starting.working()  # of a second reward model, say
    clock(50)
    assert starting.finished(called=105.0) == (50.0, {"start": 12.0, "load": 7.0})


def test_the_next_stage_of_a_process_begins_where_the_last_one_ended(clock):
    starting.working()
    clock(30)
    starting.finished(called=101.0)
    clock(42)
    assert starting.command_began() == 130.0
    assert starting.finished(called=133.0) == (12.0, {"start": 3.0, "load": 0.0})


def test_garbage_is_collected_as_ever_once_the_work_begins(clock):
    usual = gc.get_threshold()
    starting.collect_less()
    assert gc.get_threshold()[0] > 100 * usual[0] > 0 and gc.isenabled()
    starting.working()
    assert gc.get_threshold() == usual
