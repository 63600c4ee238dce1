"""Rollouts that are sampled while earlier ones are trained on: asynchronous PPO of bounded staleness.

The staleness of a rollout is the number of steps between the policy that sampled it and the one that it trains. It is
bounded as in AReaL (2505.24298, section 5.1), whose eta is `most` here: rollout n may be begun with the weights
after step i only if n - 1 - i <= eta. With eta = 1 this is the one-step off-policy RLHF of Noukhovitch et al.
(2410.18252). Rollouts that go on under new weights are the partial rollouts of Kimi k1.5 (2501.12599) and the in-flight
weight updates of PipelineRL (2509.19128).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ahead(Generic[T]):
    """One rank's rollouts in the order of their steps. A thread samples them one after the other.

    Args:
        sample: (step, policy) -> the rollout of `step`, by the weights that the sampler has: those after step `policy`.
        most: by how many steps a rollout may be off-policy. 0: each is sampled when it is asked for.
        last: the last step of the run.
        carry: whether a rollout that is being sampled goes on under new weights, or these wait for it.

    Attributes:
        policy: the step whose weights the sampler has, 0 for the reference: at least that step, where others are on
            their way.
    """

    def __init__(self, sample: Callable[[int, int], T], *, most: int, last: int, carry: bool = False):
        self._sample, self._most, self._last, self._carry = sample, most, last, carry
        self._thread = ThreadPoolExecutor(1)
        self._rollouts: dict[int, Future[T]] = {}
        self._coming = self.policy = 0

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

    @property
    def newest(self) -> int:
        """The last step whose weights the sampler may have."""
        return max(self.policy, self._coming)

    @contextmanager
    def renewed(self, step: int) -> Iterator[None]:
        """Around giving the sampler the weights after `step`. Every rank must enter it.

        Without `carry`, all of a rank's responses of a step come from one policy.
        """
        if not self._carry:
            self.drain()
        self._coming = step
        yield
        self.policy = step

    def drain(self) -> None:
        """Wait for the rollout that is being sampled, on all ranks; those that are not begun are left to `fill`."""
        if self._most:
            self._rollouts = {step: rollout for step, rollout in self._rollouts.items() if not rollout.cancel()}
            wait(self._rollouts.values())  # what they raised is for `take`
            if dist.is_initialized():
                dist.barrier()

    def close(self) -> None:
        """Begin nothing more, so that a run that fails does not sample what nobody trains on."""
        self._thread.shutdown(wait=False, cancel_futures=True)
