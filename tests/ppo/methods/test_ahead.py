"""Rollouts that are sampled ahead: their order, the policy that each comes from, and how old that is."""

import random
import threading
import time

import pytest

from core.config import Ppo
from ppo.methods import ahead as ahead_module
from ppo.methods.ahead import Ahead
from ppo.rollout import staleness

STEPS = 12


class Sampler:
    """Takes some time for each rollout, and sees when its weights change meanwhile."""

    def __init__(self, wait=lambda: None):
        self.wait, self.weights, self.torn = wait, 0, 0
        self.asked, self.busy = [], threading.Lock()

    def __call__(self, step: int, policy: int) -> tuple[int, int]:
        assert self.busy.acquire(blocking=False), "two rollouts at a time"
        before = self.weights
        self.wait()
        self.torn += before != self.weights or policy != before
        self.busy.release()
        self.asked.append(step)
        return step, before

    def wait_until_asked(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.asked) < count:
            assert time.monotonic() < deadline, f"only {self.asked} were sampled"
            time.sleep(0.001)


def trained(sampler: Sampler, most: int, train, *, first: int = 1, last: int = STEPS) -> list[int]:
    """The loop of `ppo.train`, from step `first` on: the staleness of the rollout of each step."""
    ahead, found = Ahead(sampler, most=most, last=last), []
    ahead.policy = sampler.weights = first - 1
    for step in range(first, last + 1):
        of, policy = ahead.take(step)
        assert of == step
        found.append(step - 1 - policy)
        ahead.fill(step + 1)
        train(step)
        with ahead.renewed(step):
            sampler.weights = step
            time.sleep(0.001)  # a rollout that was begun too early would see both weights
    ahead.close()
    return found


@pytest.mark.parametrize("most", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_rollouts_come_in_order_once_each_from_one_policy_that_is_never_too_old(most, seed):
    rng = random.Random(seed)
    sampler = Sampler(lambda: time.sleep(rng.choice([0.0, 0.001, 0.006])))
    found = trained(sampler, most, lambda step: time.sleep(rng.choice([0.0, 0.002, 0.008])))
    assert sampler.asked == list(range(1, STEPS + 1)) and not sampler.torn
    assert found[0] == 0 and all(0 <= age <= most for age in found)
    policies = [step - age for step, age in enumerate(found)]
    assert policies == sorted(policies)
    if most == 0:
        assert found == [0] * STEPS


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_fast_sampler_is_as_far_ahead_as_it_may_be(most):
    sampler = Sampler()
    found = trained(sampler, most, lambda step: sampler.wait_until_asked(min(step + most, STEPS)))
    assert found == [min(step, most) for step in range(STEPS)]


def test_a_slow_sampler_is_one_step_ahead_since_new_weights_reach_what_is_not_begun(monkeypatch):
    """One that is done with a rollout only while the trainer waits for it."""
    begun, trainer_waits, wait = threading.Semaphore(0), threading.Event(), ahead_module.wait

    def sampling() -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.release()
            assert trainer_waits.wait(30)

    def waiting(rollouts) -> None:
        trainer_waits.set()
        wait(rollouts)
        trainer_waits.clear()

    monkeypatch.setattr(ahead_module, "wait", waiting)
    found = trained(Sampler(sampling), 3, lambda step: step == STEPS or begun.acquire(timeout=30))
    assert found == [0] + [1] * (STEPS - 1)


def test_a_resumed_run_samples_again_what_was_in_flight():
    sampler = Sampler()
    found = trained(sampler, 2, lambda step: sampler.wait_until_asked(min(step + 2, STEPS) - 7), first=8)
    assert sampler.asked == list(range(8, STEPS + 1)) and found == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("seed", range(3))
def test_rollouts_that_go_on_under_new_weights_are_as_old_as_their_first_token(seed):
    rng, found = random.Random(seed), []
    sampler = Sampler(lambda: time.sleep(rng.choice([0.0, 0.001, 0.006])))
    ahead = Ahead(sampler, most=2, last=STEPS, carry=True)
    for step in range(1, STEPS + 1):
        of, policy = ahead.take(step)
        found.append(step - 1 - policy)
        assert of == step and ahead.newest == ahead.policy == step - 1
        ahead.fill(step + 1)
        time.sleep(rng.choice([0.0, 0.002, 0.008]))
        with ahead.renewed(step):
            assert (ahead.policy, ahead.newest) == (step - 1, step)
            sampler.weights = step
    assert sampler.asked == list(range(1, STEPS + 1)) and all(0 <= age <= 2 for age in found)


def test_new_weights_do_not_wait_for_rollouts_that_go_on_under_them():
    release, begun = threading.Event(), threading.Event()

    def sample(step: int, policy: int) -> tuple[int, int]:
        begun.set()
        assert release.wait(30)
        return policy, ahead.newest

    ahead = Ahead(sample, most=1, last=9, carry=True)
    ahead.fill(1)
    assert begun.wait(30)
    with ahead.renewed(1):  # would hang here
        pass
    release.set()
    assert ahead.take(1) == (0, 1)


def test_an_error_is_that_of_its_own_step_and_nothing_more_is_begun():
    asked = []

    def sample(step: int, policy: int) -> int:
        asked.append(step)
        if step == 2:
            raise OSError("no answer")
        time.sleep(0.05)
        return step

    ahead = Ahead(sample, most=4, last=9)
    ahead.fill(1)
    assert ahead.take(1) == 1
    ahead.drain()  # the error is not raised here, where other ranks wait
    with pytest.raises(OSError, match="no answer"):
        ahead.take(2)
    ahead.fill(3)
    ahead.close()
    time.sleep(0.3)
    assert len([step for step in asked if step > 2]) <= 2, "those that were not begun are left"


def test_staleness_is_counted_over_responses():
    rows = [{"step": 9, "policy": policy} for policy in (8, 8, 7, 5)]
    assert staleness(rows) == {"staleness_mean": 1.0, "staleness_max": 3.0}


def test_the_option_is_a_number_of_steps_or_true():
    servers = {"vllm_servers": ("http://a:1",)}
    found = [Ppo(overlap=value, **servers).ahead for value in (False, True, 0, 1, 4)]
    assert found == [0, 1, 0, 1, 4]
    assert Ppo(overlap=True, **servers).model_dump()["overlap"] is True, "manifests of earlier runs say true"
    with pytest.raises(ValueError):
        Ppo(overlap=-1, **servers)
    with pytest.raises(ValueError, match="set overlap too"):
        Ppo(partial_rollouts=True)
    with pytest.raises(ValueError, match="keep_policies needs rollouts of one policy"):
        Ppo(overlap=1, partial_rollouts=True, keep_policies=2, **servers)
    with pytest.raises(ValueError, match=r"overlap needs vllm_servers.*importance"):
        Ppo(overlap=2)
    with pytest.raises(ValueError, match=r"overlap needs vllm_servers.*importance"):
        Ppo(overlap=2, clip={"importance_weight": None}, **servers)
    assert Ppo(overlap=2, clip={"importance_weight": None, "importance_mask": {}}, **servers).ahead == 2
