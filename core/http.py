"""A JSON request over HTTP, with a timeout, and who can reach a server."""

from __future__ import annotations

import ipaddress
import json
import urllib.request
from collections.abc import Mapping


def ask_json(url: str, body: dict | None, timeout: float, headers: Mapping[str, str] | None = None) -> object:
    """POST `body`, or GET if it is None. Returns the JSON of the answer, or None for an empty answer.

    Args:
        headers: besides the content type.

    Raises:
        urllib.error.HTTPError, TimeoutError, OSError, http.client.HTTPException: from urllib.
        ValueError: the answer is not JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reached from its own machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or an empty one, which means all addresses
        return False
