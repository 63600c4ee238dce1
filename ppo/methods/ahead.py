"""Rollouts that are sampled while earlier ones are trained on: asynchronous PPO of bounded staleness.

The staleness of a rollout is the number of steps between the policy that sampled it and the one that it trains. It is
bounded as in AReaL (2505.24298, section 5.1), whose eta is `most` here: rollout n may be begun with the weights
after step i only if n - 1 - i <= eta. With eta = 1 this is the one-step off-policy RLHF of Noukhovitch et al.
(2410.18252).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ahead(Generic[T]):
    """One rank's rollouts in the order of their steps. A thread samples them one after the other.

    Args:
        sample: (step, policy) -> the rollout of `step`, by the weights that the sampler has: those after step `policy`.
        most: by how many steps a rollout may be off-policy. 0: each is sampled when it is asked for.
        last: the last step of the run.

    Attributes:
        policy: the step whose weights the sampler has, 0 for the reference; whoever gives it new ones sets it.
    """

    def __init__(self, sample: Callable[[int, int], T], *, most: int, last: int):
        self._sample, self._most, self._last = sample, most, last
        self._thread = ThreadPoolExecutor(1)
        self._rollouts: dict[int, Future[T]] = {}
        self.policy = 0

    def take(self, step: int) -> T:
        """The rollout of `step`: one that was begun ahead, once it is complete, or else one that is sampled now.

        Raises:
            What `sample` raised.
        """
        begun = self._rollouts.pop(step, None)
        return begun.result() if begun else self._sample(step, self.policy)

    def fill(self, step: int) -> None:
        """Let the thread begin the rollouts from `step` on, as many as are not too far from the weights as they are."""
        if self._most:
            for later in range(step, min(self.policy + 1 + self._most, self._last) + 1):
                if later not in self._rollouts:
                    self._rollouts[later] = self._thread.submit(self._begin, later)

    def _begin(self, step: int) -> T:
        return self._sample(step, self.policy)  # the weights may be newer than when the step was put into the queue

    def hold(self) -> None:
        """Before the sampler gets new weights: wait for the rollout that is being sampled, on all ranks.

        Those that are not begun yet are left to the next `fill`, so all of a rank's responses of a step come from one
        policy, and from a later one. Every rank must call it.
        """
        if not self._most:
            return
        self._rollouts = {step: rollout for step, rollout in self._rollouts.items() if not rollout.cancel()}
        wait(self._rollouts.values())  # what they raised is for `take`
        if dist.is_initialized():
            dist.barrier()

    def close(self) -> None:
        """Begin nothing more, so that a run that fails does not sample what nobody trains on."""
        self._thread.shutdown(wait=False, cancel_futures=True)
