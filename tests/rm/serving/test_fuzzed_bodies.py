"""Bodies of every kind to `grm rm-serve`: rewards, or an error of the client that says why; never one of the server."""

import http.client
import json
import math
from collections import Counter

import pytest

from rm.serving.server import Ensemble
from tests.builders.inputs.fuzz import cases, damaged, mutated, value
from tests.builders.reward_models import tiny_reward_model
from tests.builders.reward_server import serving

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
BODIES = {
    "/score": {"conversations": [CHAT, CHAT], "token_ids": None, "tokenizer": None},
    "/get_reward": {"query": ["2 + 2? 4", "2 + 2? 5"], "prompts": ["2 + 2?", "2 + 2?"], "labels": None},
}


@pytest.fixture(scope="module")
def address(tokenizer_path):
    model = tiny_reward_model(tokenizer_path, "linear")
    with serving(Ensemble(["a"], [model], batch_tokens=256), max_tokens=200, max_body=20_000) as url:
        yield url.removeprefix("http://")


def post(address: str, path: str, body: bytes) -> tuple[int, object]:
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("POST", path, body)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_a_fault_of_the_server(address, path):
    whole, seen = json.dumps(BODIES[path]).encode(), Counter()
    for rng in cases(path, 120):
        kind = rng.randrange(4)
        if kind == 0:
            body = json.dumps(value(rng)).encode()
        elif kind == 1:
            body = damaged(rng, whole)
        else:
            body = json.dumps(mutated(rng, mutated(rng, BODIES[path]))).encode()
        status, answer = post(address, path, body)
        assert status in (200, 400, 413), (body, answer)
        seen[status] += 1
        if status == 200:
            assert all(math.isfinite(reward) for reward in answer["rewards"])
        else:
            assert answer["error"].strip()
    assert seen[200] and seen[400]
    assert post(address, path, whole)[0] == 200 and post(address, path, b" " * 20_001)[0] == 413
