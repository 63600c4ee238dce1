"""PPO on two vLLM servers, one of which hangs or dies in the middle of a rollout. Both ask for a token."""

import os
import signal
import subprocess
import urllib.error
from contextlib import ExitStack

import pytest

from core import whereabouts
from core.files import read_rows
from core.http import TOKEN_VARIABLE, ask_json, with_token
from core.ranks import free_port
from tests.builders.inputs.tiny_run import copy_of, tiny_run
from tests.builders.processes import GRM, ROOT, background, wait_for

pytestmark = pytest.mark.long
TOKEN = "a token of this test"


def ready(url: str) -> bool:
    try:
        return bool(ask_json(f"{url}/v1/models", None, 5, with_token(TOKEN)))
    except OSError:
        return False


@pytest.fixture(scope="module")
def start(tokenizer_path, tmp_path_factory):
    """The folder of a run before its stage `ppo`."""
    folder = tmp_path_factory.mktemp("start")
    tiny_run(tokenizer_path, folder)
    return folder


@pytest.fixture
def servers(start, tmp_path):
    """Two servers: their addresses and processes."""
    with ExitStack() as stack:
        made = {}
        for i in range(2):
            port = free_port()
            command = [*GRM, "vllm-serve", "-c", start / "config.yaml", "--port", port]
            env = {TOKEN_VARIABLE: TOKEN, "PYTHONPATH": str(ROOT)}
            server = stack.enter_context(background(*command, log=tmp_path / f"server-{i}.log", env=env))
            made[f"http://127.0.0.1:{port}"] = server
        for url, server in made.items():
            wait_for(lambda url=url: ready(url), server)
        yield made


def test_a_server_that_hangs_is_named_and_one_that_dies_is_replaced(start, servers, tmp_path):
    (first, _), (second, process) = servers.items()
    for path in ("/v1/models", "/reset_prefix_cache", "/collective_rpc"):  # vLLM's own key leaves the last two open
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask_json(second + path, None if "models" in path else {}, 5)
        assert refused.value.code == 401
    config = copy_of(start, tmp_path)
    job = [*GRM, "ppo", "-c", str(config), f"ppo.vllm_servers=[{first},{second}]", "ppo.steps=12"]
    env = {**os.environ, TOKEN_VARIABLE: TOKEN, "PYTHONPATH": str(ROOT)}
    place = lambda: whereabouts.read(whereabouts.folder_of(tmp_path / "tiny", "ppo")).get(1)  # noqa: E731

    with background(*job, "ppo.server_timeout=40", log=tmp_path / "hangs.log", env=env) as run:
        wait_for(lambda: getattr(place(), "step", 0) >= 2, run)
        process.send_signal(signal.SIGSTOP)
        assert run.wait(400) == 2
    said = (tmp_path / "hangs.log").read_text()
    assert f"vLLM server {second}" in said and "no answer within 40 s (ppo.server_timeout)" in said
    assert "Traceback" not in said

    process.send_signal(signal.SIGCONT)
    with background(*job, "ppo.server_retries=1", log=tmp_path / "dies.log", env=env) as run:
        wait_for(lambda: (p := place()) and p.phase == "collect" and p.step >= 3, run)
        process.send_signal(signal.SIGSTOP)  # so that a request is under way when it dies
        beats = place().beat
        wait_for(lambda: place().phase in ("collect", "sync") and place().beat > beats + 2, run)
        process.kill()
        assert run.wait(600) == 0
    said = (tmp_path / "dies.log").read_text()
    assert f"vLLM server {second}" in said and "(ppo.server_retries)" in said and "Traceback" not in said
    rows = read_rows(tmp_path / "tiny" / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[-1]["servers_lost"] == 1
    again = subprocess.run(
        [*job, "ppo.server_retries=1"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0 and "up to date" in again.stderr
