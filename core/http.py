"""A JSON request over HTTP, with a timeout."""

from __future__ import annotations

import json
import urllib.request


def ask_json(url: str, body: dict | None, timeout: float) -> object:
    """POST `body`, or GET if it is None. Returns the JSON of the answer, or None for an empty answer.

    Raises:
        urllib.error.HTTPError, TimeoutError, OSError, http.client.HTTPException: from urllib.
        ValueError: the answer is not JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read()
    return json.loads(text) if text else None
