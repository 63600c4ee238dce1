"""A queue of requests: those that wait at the same time are scored together, by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from torch import Tensor

from rm.reading import Tokens

GATHERED = 8
"""Batches that one call scores at most. More of them sort better by length, but small requests wait longer."""


class _Job(NamedTuple):
    rows: list[Tokens]
    future: Future


class ScoringQueue:
    """Rows to be scored in one thread of its own -> futures of rewards [k, n].

    Args:
        score: n rows -> rewards [k, n].
        batch_tokens: padded tokens of one forward pass.
    """

    def __init__(self, score: Callable[[Sequence[Tokens]], Tensor], *, batch_tokens: int):
        self._score, self._limit = score, GATHERED * batch_tokens
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, rows: list[Tokens]) -> Future:
        """The future rewards of the rows, or the exception of scoring them; RuntimeError once closed."""
        job = _Job(rows, Future())
        with self._lock:
            if self._closed:
                raise RuntimeError("the scoring queue is closed")
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Scores the waiting rows, then ends the thread."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs, size, last = [job], _size(job), False
            while size < self._limit and not self._jobs.empty():
                if (job := self._jobs.get()) is None:
                    last = True
                    break
                jobs.append(job)
                size += _size(job)
            self._run([job for job in jobs if job.future.set_running_or_notify_cancel()])
            if last:
                return

    def _run(self, jobs: list[_Job]) -> None:
        try:
            rewards = self._score([row for job in jobs for row in job.rows])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:  # one request must not make the others fail
                for job in jobs:
                    self._run([job])
            return
        for job, part in zip(jobs, rewards.split([len(job.rows) for job in jobs], dim=1), strict=True):
            job.future.set_result(part)


def _size(job: _Job) -> int:
    return sum(len(prompt) + len(response) for prompt, response in job.rows)
