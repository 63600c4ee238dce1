"""Clients of `grm rm-serve` that keep their connections and ask again and again."""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections.abc import Sequence
from typing import NamedTuple

TOLERANCE = 1e-4
"""Of a reward that was computed in another batch, in float32."""
BAD_ONE_IN = 50
"""So many requests are such that the server must refuse them."""


class Question(NamedTuple):
    path: str
    body: dict
    rewards: list[float]
    """What the server answered when it had nothing else to do; empty where it must refuse."""


def questions(prompts: Sequence[str], seed: int) -> list[Question]:
    """Requests of one to four conversations of all lengths, in both forms that the server takes."""
    rng = random.Random(seed)
    texts = [text * rng.choice((1, 1, 1, 3)) for text in prompts]
    found = []
    for i in range(len(texts)):
        some = [rng.choice(texts) for _ in range(rng.randint(1, 4))]
        answers = [rng.choice(texts)[: rng.randint(1, 200)] for _ in some]
        chats = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
            for q, a in zip(some, answers, strict=True)
        ]
        if i % BAD_ONE_IN == BAD_ONE_IN - 1:
            found.append(Question("/score", {"conversations": [[{"role": "nobody", "content": "x"}]]}, []))
        else:
            found.append(Question("/score", {"conversations": chats}, []))
    return found


def ask(connection: http.client.HTTPConnection, question: Question) -> tuple[int, dict]:
    connection.request("POST", question.path, json.dumps(question.body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def answered(port: int, asked: Sequence[Question]) -> list[Question]:
    """The questions with the server's answers, asked one by one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    found = []
    for question in asked:
        status, answer = ask(connection, question)
        found.append(question._replace(rewards=answer["rewards"] if status == 200 else []))
    connection.close()
    return found


class Clients:
    """Threads with a connection each, which share out the requests.

    Attributes:
        done: requests that were answered.
        faults: answers that were wrong, a line each.
    """

    def __init__(self, port: int, asked: Sequence[Question], connections: int, requests: int):
        self.done, self.faults = 0, list[str]()
        self._port, self._asked, self._lock = port, asked, threading.Lock()
        shares = [requests // connections + (k < requests % connections) for k in range(connections)]
        self.threads = [threading.Thread(target=self._run, args=(k, share)) for k, share in enumerate(shares)]
        for thread in self.threads:
            thread.start()

    def running(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def _run(self, number: int, requests: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        rng = random.Random(number)
        for _ in range(requests):
            question = rng.choice(self._asked)
            try:
                status, answer = ask(connection, question)
                fault = _fault(question, status, answer)
            except (OSError, http.client.HTTPException, ValueError) as error:
                fault = f"{type(error).__name__}: {error}"
                connection.close()
            with self._lock:
                self.done += 1
                if fault:
                    self.faults.append(fault)
        connection.close()


def _fault(question: Question, status: int, answer: dict) -> str:
    if not question.rewards:
        return "" if status == 400 and "error" in answer else f"a bad request was answered with {status}"
    if status != 200:
        return f"status {status}: {answer}"
    worst = max(abs(a - b) for a, b in zip(answer["rewards"], question.rewards, strict=True))
    return "" if worst <= TOLERANCE else f"a reward is off by {worst:.2g}"
