"""Which requests a server with a token answers, and which servers need one."""

import asyncio

import pytest

from core.errors import ConfigError
from core.generation import serve
from core.http import TOKEN_VARIABLE, TokenRequired, check_host, token_of, with_token

SECRET = "opensesame"


def answers(headers: dict[str, str], query: str = "", *, kind: str = "http", token: str | None = SECRET) -> list:
    """What the client of a server with this token gets."""
    sent: list = []

    async def app(scope, receive, send):
        await send("answered")

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "query_string": query.encode()}
    scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(TokenRequired(app, token)(scope, None, send))
    return sent


def test_only_the_token_opens_the_server(monkeypatch):
    assert answers(with_token(SECRET)) == ["answered"] and answers({}, f"a=b&token={SECRET}") == ["answered"]
    for headers, query in (({}, ""), (with_token("open"), ""), ({}, "token=sesame"), (with_token(SECRET + "x"), "")):
        start, body = answers(headers, query)
        assert start["status"] == 401 and b"no token, or a wrong one" in body["body"]
    assert answers({}, kind="websocket")[0]["type"] == "websocket.close"
    assert answers({}, kind="lifespan") == ["answered"]
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert answers({}, token=None) == ["answered"]
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    assert answers({}, token=None)[0]["status"] == 401 and token_of("given") == "given" and token_of(None) == SECRET


@pytest.mark.parametrize("host", ["0.0.0.0", "", "node3", "10.0.0.2"])
def test_a_server_for_other_machines_needs_a_token(host, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=f"set {TOKEN_VARIABLE} to a token"):
        serve.main(["--host", host])
    check_host("127.0.0.1", None)
    check_host(host, SECRET)


def test_the_token_is_no_argument_of_the_server(monkeypatch):
    """Other users of the machine see the arguments of a program."""
    called = []
    monkeypatch.setattr(serve.os, "execve", lambda *given: called.append(given))
    serve.main(["--host", "10.0.0.2", "--token", SECRET])
    ((_, command, settings),) = called
    assert command[command.index("--middleware") + 1] == "core.http.TokenRequired"
    assert settings[TOKEN_VARIABLE] == SECRET and not any(SECRET in word for word in command)
