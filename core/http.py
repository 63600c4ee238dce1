"""A JSON request over HTTP, with a timeout; and who can reach a server, and with which token."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from core.errors import ConfigError

TOKEN_VARIABLE = "GRM_SERVE_TOKEN"
"""Environment variable with the token that servers ask of their clients: `grm rm-serve` and `grm vllm-serve`."""


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


def token_of(given: str | None) -> str | None:
    """The token of a server or client: the one that was given, else that of the environment; None for none."""
    return given or os.environ.get(TOKEN_VARIABLE) or None


def with_token(token: str | None) -> dict[str, str]:
    """The headers of a client that has this token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def check_host(host: str, token: str | None) -> None:
    """ConfigError for a server that other machines can ask without a token."""
    if not token and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines ask: set {TOKEN_VARIABLE} to a token, here and for the clients"
        )


class TokenRequired:
    """ASGI middleware of a server: a request without the token is answered with 401, whatever it asks for.

    The token stands in the header `Authorization: Bearer TOKEN`, or for clients that send no headers in the address,
    `?token=TOKEN`.

    Args:
        token: by default that of the environment.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], token: str | None = None):
        self._app, self._token = app, token_of(token)

    async def __call__(self, scope: Mapping[str, Any], receive: Callable, send: Callable) -> None:
        if self._token and scope["type"] in ("http", "websocket") and not _has_token(scope, self._token):
            return await _refuse(scope, send)
        await self._app(scope, receive, send)


def _has_token(scope: Mapping[str, Any], token: str) -> bool:
    header = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
    query = parse_qs(scope.get("query_string", b"").decode(errors="replace")).get("token", [""])[0]
    given = header.removeprefix(b"Bearer ") or query.encode(errors="replace")
    return hmac.compare_digest(given, token.encode())


async def _refuse(scope: Mapping[str, Any], send: Callable) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": "no token, or a wrong one"}).encode()})
