"""What looks like a vLLM server to `core.generation.remote`, in threads of the test: it answers without a model."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeVllm:
    """One server.

    Attributes:
        url: its address.
        seen: path (without what follows a ?) and body of each request, in the order in which they came.
        drops: path -> how many of the next requests to it have no answer.
        how: their connection is reset, closed, or closed in the middle of the answer.
        during: called with the path while a request is under way.
    """

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[tuple[str, dict | None]] = []
        self.drops: Counter[str] = Counter()
        self.how = "closed"
        self.during: Callable[[str], None] = lambda path: None

    def count(self, path: str) -> int:
        """Requests to this path."""
        return sum(asked == path for asked, _ in self.seen)

    def answer(self, path: str, body: dict | None) -> dict:
        """What a vLLM server would say; each response is the token 7."""
        if path == "/v1/models":
            return {"data": [{"id": "policy", "max_model_len": 512}]}
        if path == "/v1/completions":
            assert body
            one = {"token_ids": [7], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "stop"}
            return {"choices": [{"index": i, **one} for i in range(len(body["prompt"]) * body["n"])]}
        if path == "/get_world_size":
            return {"world_size": 1}
        return {"success": True}


@contextmanager
def fake_vllm() -> Iterator[FakeVllm]:
    """A server that runs inside the block."""
    fake = FakeVllm()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: dict | None) -> None:
            path = self.path.partition("?")[0]
            fake.seen.append((path, body))
            fake.during(path)
            text = json.dumps(fake.answer(path, body)).encode()
            drop = fake.drops[path] > 0
            fake.drops[path] -= drop
            if drop and fake.how == "reset":  # closed at once, whatever is still to be sent
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if not drop or fake.how == "half":
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text[: len(text) // 2] if drop else text)
            self.close_connection = True
            if drop:
                self.wfile.flush()
                self.connection.close()

        def log_message(self, *_: object) -> None: ...

        def finish(self) -> None:
            if not self.connection._closed:  # type: ignore[attr-defined]
                super().finish()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
