"""A JSON request with a timeout."""

from __future__ import annotations

import json
import urllib.request


def ask_json(url: str, body: dict | None, timeout: float) -> object:
    """POST `body`, or GET where it is None; the JSON answered, None for an empty answer.

    Raises:
        urllib.error.HTTPError, TimeoutError, OSError, http.client.HTTPException: as urllib does.
        ValueError: the answer is no JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read()
    return json.loads(text) if text else None
