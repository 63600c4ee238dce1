"""The client of a reward server that is slow, wrong or not there."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.errors import DataError
from rm.serving.client import RemoteError, RemoteRewardModel
from tests.builders.checkpoints import CHATS


@contextmanager
def pretending(*answers: tuple[float, int, object] | Callable, health: dict | None = None) -> Iterator[str]:
    """A server that answers POST with (delay in seconds, status, body) in turn, the last one for ever.

    An answer may also be a function of the handler, which is called before the body is read.
    """
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, delay: float, status: int, body: object) -> None:
            time.sleep(delay)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            self.answer(0, 200, health or {"status": "ok", "tokenizer": "abc", "mean": 0.0, "std": 1.0})

        def do_POST(self) -> None:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if callable(answer):
                answer(self)
                return
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(*answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_does_not_read_to_the_end_is_asked_once():
    """So does one that finds the body too large; the same body will not do better a second time."""
    asked, long = [], [{"role": "user", "content": "x" * (16 << 20)}, CHATS[0][-1]]

    def hang_up(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.shutdown(socket.SHUT_RD)
        handler.connection.close()

    with pretending(hang_up) as address, pytest.raises(DataError, match="above the server's limit"):
        RemoteRewardModel(address).score([long])
    assert asked == ["/score"]


@pytest.mark.slow
def test_the_client_tries_again_after_a_failure(monkeypatch):
    monkeypatch.setattr("core.http.time.sleep", lambda seconds: None)
    with pretending((0, 503, {}), (0, 200, {"rewards": [1.5]})) as address:
        assert RemoteRewardModel(address, retries=1).score(CHATS[:1]).tolist() == [1.5]
    with pretending((0, 404, {"error": "nothing"})) as address, pytest.raises(RemoteError, match=r"404.*attempts: 1"):
        RemoteRewardModel(address).score(CHATS[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": [1.0]}, "1 rewards for 2"),
        ({"reward": 1.0}, "no rewards for 2"),
        ({"rewards": [1.0, None]}, "not numbers"),
        ({"rewards": [1.0, float("nan")]}, "finite"),
        ([1.0, 2.0], "not answer with a JSON object"),
    ],
)
def test_answers_that_are_no_rewards_are_refused(answer, message):
    with pretending((0, 200, answer)) as address, pytest.raises(RemoteError, match=message):
        RemoteRewardModel(address).score(CHATS[:2])


@pytest.mark.slow
def test_the_client_checks_the_server_at_its_start():
    slow = pretending((1.0, 200, {"rewards": [1.0]}))
    with slow as address, pytest.raises(RemoteError, match="no answer within 0.2 s"):
        RemoteRewardModel(address, timeout=0.2, retries=0).score(CHATS[:1])
    with (
        pretending((0, 200, {}), health={"hello": 1}) as address,
        pytest.raises(RemoteError, match="no `grm rm-serve`"),
    ):
        RemoteRewardModel(address)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(RemoteError, match="refused.*attempts: 1"):
            RemoteRewardModel(f"http://127.0.0.1:{unused.getsockname()[1]}", retries=0)
