"""JSON requests over HTTP, with a timeout and further attempts; who can reach a server, and with which token."""

from __future__ import annotations

import hmac
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from core.errors import ConfigError

TOKEN_VARIABLE = "GRM_SERVE_TOKEN"
"""Environment variable with the token that servers ask of their clients: `grm rm-serve` and `grm vllm-serve`."""


DROPPED = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, http.client.IncompleteRead)
"""Errors of a connection that was there and was closed before the whole answer came. RemoteDisconnected is one."""


class NoAnswer(Exception):
    """Why a request has no answer that can be used. Callers say in their own words what to do about it.

    Args:
        said: what went wrong, in words; of a status, what the server wrote.
        status: of HTTP; None where there is none.
        attempts: how often the request was sent.
        cut_off: the server closed the connection before it had read the body.
    """

    def __init__(self, said: str, status: int | None, attempts: int, *, cut_off: bool = False):
        super().__init__(f"HTTP {status}: {said}" if status else said)
        self.said, self.status, self.attempts, self.cut_off = said, status, attempts, cut_off


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


def was_dropped(error: Exception) -> bool:
    """Whether `ask_json` raised this because the other side closed the connection; it may have had the request."""
    return isinstance(getattr(error, "reason", error), DROPPED)


def ask_patiently(
    url: str, body: dict | None, timeout: float, *, retries: int, headers: Mapping[str, str] | None = None
) -> dict:
    """`ask_json` for a JSON object, with up to `retries` further attempts and pauses of 1, 2, 4, ... 10 seconds.

    It is asked again where there is no connection, no answer in time, or a failure of the server (5xx). What the server
    refuses (4xx), and an answer that is no JSON object, would be the same at the next attempt.

    Raises:
        NoAnswer: after the last attempt.
    """
    for attempt in range(1, retries + 2):
        if attempt > 1:
            time.sleep(min(2.0 ** (attempt - 2), 10.0))
        try:
            answer = ask_json(url, body, timeout, headers)
        except urllib.error.HTTPError as error:
            fault = NoAnswer(_message(error), error.code, attempt)
            if error.code < 500:
                break
        except ValueError:
            fault = NoAnswer("it does not answer with JSON", None, attempt)
            break
        except TimeoutError:
            fault = NoAnswer(f"no answer within {timeout:g} s", None, attempt)
        except (OSError, http.client.HTTPException) as error:
            # urllib gives a reason where the request could not be sent.
            reason = getattr(error, "reason", None)
            if body and isinstance(reason, (BrokenPipeError, ConnectionResetError)):
                fault = NoAnswer(str(reason), None, attempt, cut_off=True)
                break
            late = isinstance(reason, TimeoutError)
            fault = NoAnswer(f"no answer within {timeout:g} s" if late else str(reason or error), None, attempt)
        else:
            if isinstance(answer, dict):
                return answer
            fault = NoAnswer("it does not answer with a JSON object", None, attempt)
            break
    raise fault


def _message(error: urllib.error.HTTPError) -> str:
    """What the server wrote: its `error`, if it is JSON with one, else the beginning of its text."""
    text = error.read().decode(errors="replace")
    try:
        return json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text[:300] or error.reason


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
