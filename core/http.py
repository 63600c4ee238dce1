"""JSON requests over HTTP, with a timeout and further attempts, and who can reach a server."""

from __future__ import annotations

import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping


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
