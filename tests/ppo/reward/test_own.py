"""Rewards of the user's own: what they are given, what they may return, and how they are mixed with reward models."""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core.config import Config, Reward
from core.errors import ArtefactError, DataError
from ppo.reward.mixed import MixedReward
from ppo.reward.own import FunctionReward, UrlReward, checked, own_rewards
from rm.serving.server import Ensemble
from tests.builders.checkpoints import CHATS, CLOSE
from tests.builders.reward_models import tiny_reward_model
from tests.builders.reward_server import serving

ROWS = [
    {"prompt": chat[:-1], "response": chat[-1]["content"], "prompt_id": f"id{i}", "metadata": json.dumps({"answer": i})}
    for i, chat in enumerate(CHATS)
]
N = len(ROWS)


@pytest.fixture
def function(tmp_path, monkeypatch):
    """A `FunctionReward` of a function with this body."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    count = iter(range(9))

    def make(body: str) -> FunctionReward:
        name = f"own_rewards_{next(count)}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(f"def f(prompts, responses, metadata):\n    {body}\n")
        return FunctionReward(f"{name}:f")

    return make


def test_a_function_gets_messages_texts_and_metadata_in_one_call(function):
    body = "return [len(responses) + m['answer'] + 0.1 * (p[-1]['role'] == 'user') for p, m in zip(prompts, metadata)]"
    assert function(body).score(ROWS).tolist() == pytest.approx([N + i + 0.1 for i in range(N)])
    assert function("return [float(m == {}) for m in metadata]").score([{**ROWS[0], "metadata": ""}]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", rf"gave 1 rewards for {N} responses"),
        ("return None", "gave NoneType, and not a list of rewards"),
        ("return [float('nan' if m['answer'] == 1 else 0) for m in metadata]", r"gave nan for prompt id1 \(response 1"),
        ("return [float('inf')] * len(responses)", r"gave inf for prompt id0 .*must be finite"),
        ("return ['0.5'] * len(responses)", r"gave '0\.5' for prompt id0 .*return a float"),
        ("return [0.0] * (len(responses) - 1) + [None]", rf"gave None for prompt id{N - 1} "),
        ("return [True] * len(responses)", r"gave True for prompt id0"),
        ("return [1 / (m['answer'] - 1) for m in metadata]", r"failed on prompt id1 \(response 1 .*ZeroDivisionError"),
        ("assert len(responses) < 2; return [0.0]", rf"on {N} responses together, and on none alone"),
    ],
)  # fmt: skip
def test_what_is_no_reward_is_refused_by_prompt(function, body, message):
    with pytest.raises(DataError, match=rf"ppo\.reward\.function own_rewards_\w+:f .*{message}"):
        function(body).score(ROWS)


@pytest.mark.parametrize("found", [np.arange(N, dtype=np.float32), torch.arange(N) * 1.0, tuple(range(N))])
def test_arrays_tensors_and_whole_numbers_are_rewards(found):
    assert checked("f", found, ROWS).tolist() == list(range(N))


def test_a_column_of_rewards_is_no_list(function):
    with pytest.raises(DataError, match=r"gave \[0\.0\] for prompt id0"):
        checked("f", torch.zeros(N, 1), ROWS)


@contextmanager
def openrlhf(answer):
    """A server that answers with `answer(body)`, or a list of (status, answer); and the bodies that it got."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, said = answer(len(bodies), bodies[-1])
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/get_reward", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_gets_openrlhfs_shape(tokenizer_path, monkeypatch):
    """Texts with control tokens, as the policy read and wrote them; a server that fails once is asked again."""
    monkeypatch.setattr("core.http.time.sleep", lambda seconds: None)
    tokenizer = tiny_reward_model(tokenizer_path, "mlp").tokenizer
    cut_off = {**ROWS[0], "token_ids": tokenizer.response_ids(ROWS[0]["response"])[:-1]}
    lengths = lambda count, body: (503, {}) if count == 1 else (200, {"rewards": [len(q) for q in body["query"]]})  # noqa: E731
    with openrlhf(lengths) as (url, bodies):
        found = UrlReward(url, tokenizer, label="answer", timeout=60).score([cut_off, ROWS[1]])
    assert len(bodies) == 2 and bodies[0] == bodies[1] and list(bodies[0]) == ["query", "prompts", "labels"]
    sent = bodies[0]
    assert found.tolist() == [len(query) for query in sent["query"]] and sent["labels"] == [0, 1]
    end = tokenizer.hf.decode([tokenizer.eot_id])
    for query, prompt, row, finished in zip(sent["query"], sent["prompts"], [cut_off, ROWS[1]], [0, 1], strict=True):
        assert query == prompt + row["response"] + end * finished
        assert prompt.startswith("<|im_start|>") and prompt.endswith("<|im_start|>assistant\n")


def test_grm_rm_serve_is_such_a_server(tokenizer_path):
    """Its rewards of the policy's own words are those of the model in this process."""
    model = tiny_reward_model(tokenizer_path, "mlp")
    with serving(Ensemble(["runs/a/rm/grm"], [model], batch_tokens=256)) as url:
        found = UrlReward(f"{url}/get_reward", model.tokenizer, label=None, timeout=60).score(ROWS)
    torch.testing.assert_close(found, model.score(CHATS), **CLOSE)


@pytest.mark.parametrize(
    ("status", "answer", "error", "message"),
    [
        (200, {"rewards": [0.5]}, DataError, rf"gave 1 rewards for {N} responses"),
        (200, {"rewards": [0.5] * (N - 1) + ["x"]}, DataError, rf"gave 'x' for prompt id{N - 1}"),
        (200, {"scores": [0.5]}, DataError, "answers without rewards: it has scores"),
        (400, {"error": "row 1 is empty"}, ArtefactError, r"HTTP 400: row 1 is empty \(attempts: 1\)"),
    ],
)
def test_a_servers_answer_that_is_no_reward_is_refused(tokenizer_path, status, answer, error, message):
    tokenizer = tiny_reward_model(tokenizer_path, "mlp").tokenizer
    with (
        openrlhf(lambda *_: (status, answer)) as (url, _),
        pytest.raises(error, match=rf"ppo\.reward\.url .*{message}"),
    ):
        UrlReward(url, tokenizer, label=None, timeout=60).score(ROWS)


def test_parts_are_weighed_in_standard_deviations_and_own_units(function):
    raw = torch.arange(N) * 3.0 + 1.0
    proxy = SimpleNamespace(mean=2.0, std=4.0, score=lambda rows, batches: raw)
    own = {"function": function("return [m['answer'] - 0.5 for m in metadata]")}
    cfg = Reward(function="a:f", function_weight=2.0, model_weight=0.25)
    mixed = MixedReward(cfg, proxy, own)
    total, parts = mixed.score(ROWS)
    assert total.tolist() == pytest.approx([0.25 * (3 * i + 1 - 2) / 4 + 2 * (i - 0.5) for i in range(N)])
    assert parts["model"].tolist() == pytest.approx([(3 * i - 1) / 4 for i in range(N)])
    assert parts["function"].tolist() == pytest.approx([i - 0.5 for i in range(N)])
    assert (mixed.mean, mixed.std) == (0.0, 1.0)
    without, parts = MixedReward(Reward(function="a:f", model_weight=0.0), None, own).score(ROWS)
    assert without.tolist() == pytest.approx([i - 0.5 for i in range(N)]) and list(parts) == ["function"]
    alone = MixedReward(Reward(), proxy, {})
    assert alone.score(ROWS) == (raw, {}) and (alone.mean, alone.std) == (2.0, 4.0)


def test_nothing_own_is_asked_for_by_default():
    assert own_rewards(Reward(), None) == {}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"model_weight": 0.5}, "set function or url too"),
        ({"function": "my_rewards.f"}, "is not of the form module:function"),
        ({"url": "localhost:5000"}, "does not begin with http"),
        ({"url": "http://user:secret@host/get_reward"}, "holds a user or a password"),
        ({"url": "http://host/", "url_label": "answer"}, r"'answer' is none of data\.metadata \[\]"),
        ({"url_label": "answer"}, "set url too"),
    ],
)
def test_options_that_say_nothing_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"ppo": {"reward": reward}})
