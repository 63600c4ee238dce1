"""Rewards over HTTP from a real server are those of the process, for conversations and for OpenRLHF's strings."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from core.errors import ArtefactError, ConfigError, DataError
from rm.combine import minimum
from rm.model import RewardModel
from rm.serving.client import RemoteError, RemoteRewardModel
from rm.serving.rows import BadRequest, RowReader
from rm.serving.scoring_queue import ScoringQueue
from rm.serving.server import Ensemble, main
from tests.builders.checkpoints import CHATS, CLOSE
from tests.builders.reward_models import nudged, tiny_reward_model
from tests.builders.reward_server import serving

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say hello."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And goodbye?"},
    {"role": "assistant", "content": " Goodbye.\n"},
]
MANY = [*CHATS, TURNS, [*CHATS[0][:1], {"role": "assistant", "content": "A pear."}], CHATS[0]]


def post(url: str, body: object) -> tuple[int, dict]:
    """Status and answer; a `str` is sent as it is."""
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def model(tokenizer_path) -> RewardModel:
    return tiny_reward_model(tokenizer_path, "mlp")


@pytest.fixture(scope="module")
def url(model) -> Iterator[str]:
    with serving(Ensemble(["runs/a/rm/grm"], [model], batch_tokens=256), max_tokens=300) as address:
        yield address


def test_the_client_scores_as_the_model_does(model, url):
    remote = RemoteRewardModel(url + "/", tokenizer=model.tokenizer.fingerprint)
    found = remote.score(MANY)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.score(MANY), **CLOSE)
    assert torch.equal(remote.score(MANY), found) and found[0] == found[-1]
    assert torch.equal(remote.score(CHATS[:1]), model.score(CHATS[:1]))
    assert remote.score([]).shape == (0,)
    assert (remote.mean, remote.std) == (0.25, 2.0) and float(remote.normalise(torch.tensor(2.25))) == 1.0


def test_long_lists_go_in_parts(model, url, monkeypatch):
    monkeypatch.setattr("rm.serving.client.CHUNK", 2)
    remote = RemoteRewardModel(url)
    torch.testing.assert_close(remote.score(MANY), model.score(MANY), **CLOSE)
    with pytest.raises(DataError, match=r"conversations\[1\].*from number 2"):
        remote.score([*CHATS[:3], [{"role": "user", "content": "Hm?"}]])


def test_requests_at_once_get_their_own_rewards(model, url):
    remote, expected = RemoteRewardModel(url), model.score(MANY)
    requests = [[i % len(MANY), (i * i + 1) % len(MANY)][: 1 + i % 2] for i in range(40)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda rows: remote.score([MANY[r] for r in rows]), requests))
    for rows, found in zip(requests, answers, strict=True):
        torch.testing.assert_close(found, expected[rows], **CLOSE)


def rendered(model: RewardModel, end: str) -> tuple[list[str], list[str]]:
    """Prompts and queries as strings of the chat template, as OpenRLHF sends them."""
    template = model.tokenizer.hf.apply_chat_template
    prompts = [template(c[:-1], tokenize=False, add_generation_prompt=True) for c in MANY]
    return prompts, [p + c[-1]["content"] + end for p, c in zip(prompts, MANY, strict=True)]


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|><|endoftext|><|endoftext|>"])
@pytest.mark.parametrize("with_prompts", [True, False])
def test_openrlhf_gets_the_rewards_of_the_conversations(model, url, end, with_prompts):
    prompts, queries = rendered(model, end)
    queries[1] = "<|endoftext|>" * 3 + queries[1]
    body = {"query": queries, "prompts": prompts if with_prompts else None, "labels": [None] * len(queries)}
    status, found = post(f"{url}/get_reward", body)
    assert status == 200 and found.keys() == {"rewards", "scores", "extra_logs"}
    assert found["scores"] == found["rewards"] and found["extra_logs"] == {}
    torch.testing.assert_close(torch.tensor(found["rewards"]), model.score(MANY), **CLOSE)


def test_one_bos_where_the_template_writes_one(model):
    reader, bos = RowReader(model.reader), model.tokenizer.hf.bos_token
    _, queries = rendered(model, "<|im_end|>")
    assert queries[0].startswith(bos)
    expected = tuple(model.tokenizer.conversation_ids(MANY[0]))
    for query in (queries[0], bos + queries[0], queries[0].removeprefix(bos)):
        assert reader.queries({"query": [query]}) == [((), expected)]
    reader._starts_with_bos = False
    assert reader.queries({"query": [queries[0]]}) == [((), expected)]


BAD = [
    ("score", "{", "not JSON"),
    ("score", [], "list 'conversations'"),
    ("score", {"conversations": "text"}, "list 'conversations'"),
    ("score", {"conversations": [CHATS[0], []]}, "conversations[1]"),
    ("score", {"conversations": [CHATS[0], CHATS[0][:1]]}, "conversations[1]"),
    ("score", {"conversations": [CHATS[0], "text"]}, "conversations[1]"),
    ("score", {"conversations": [[*CHATS[0][:1], {"role": "assistant", "content": None}]]}, "needs a text"),
    ("score", {"conversations": [[CHATS[0][1], CHATS[0][1]]]}, "roles must alternate"),
    ("score", {"conversations": [[*CHATS[0][:1], {"role": "user", "content": "x"}]]}, "must end with the assistant"),
    ("score", {"conversations": [[*CHATS[0][:1], {"role": "assistant", "content": "no " * 400}]]}, "takes 300"),
    ("get_reward", {"prompts": []}, "list 'query'"),
    ("get_reward", {"queries": []}, "unknown key 'queries': did you mean 'query'?"),
    ("score", {"conversation": [CHATS[0]]}, "unknown key 'conversation': did you mean 'conversations'?"),
    ("score", {"conversations": [[{**CHATS[0][0], "name": "x"}, CHATS[0][1]]]}, "conversations[0]: unknown key 'name'"),
    ("score", {"conversations": [[CHATS[0][0], {"role": "assistant", "content": "\ud800"}]]}, "not valid Unicode"),
    ("score", {"conversations": [CHATS[0]], "\ud800": 1}, "unknown key"),
    ("get_reward", {"query": ["Hello \ud800"]}, "query[0]: not valid Unicode"),
    ("get_reward", {"query": ["Hello"], "prompts": ["\udfff"]}, "query[0]: not valid Unicode"),
    ("get_reward", {"query": ["<|im_end|>"]}, "query[0]: a query needs text"),
    ("get_reward", {"query": ["<|im_start|>"]}, "query[0]: a query needs text"),  # the tokenizer's BOS
    ("get_reward", {"query": ["<|endoftext|> <|im_end|>\n"]}, "query[0]: a query needs text"),
    ("score", {"conversations": [CHATS[0]], "token_ids": [[5]], "tokenizer": "other"}, "of the tokenizer 'other'"),
    ("score", {"conversations": [CHATS[0]], "token_ids": []}, "token_ids must be a list as long"),
    ("score", {"conversations": [CHATS[0]], "token_ids": [[-1]]}, "token_ids[0] must be null, or a list"),
    ("get_reward", {"query": ["Hello", 3]}, "query[1]"),
    ("get_reward", {"query": ["Hello", " "]}, "query[1]"),
    ("get_reward", {"query": ["Hello"], "prompts": ["a", "b"]}, "prompts must be a list as long"),
]


@pytest.mark.parametrize(("path", "body", "message"), BAD)
def test_what_cannot_be_scored_is_refused_with_its_row(url, path, body, message):
    status, found = post(f"{url}/{path}", body)
    assert status == 400 and message in found["error"]


def test_a_server_with_a_token_answers_nobody_else(model, monkeypatch):
    monkeypatch.delenv("GRM_SERVE_TOKEN", raising=False)
    with serving(Ensemble(["a"], [model]), token="secret") as address:
        for query in ("", "?token=wrong", "?token=%ff"):
            status, found = post(f"{address}/score{query}", {"conversations": CHATS})
            assert status == 401 and "no token" in found["error"]
        assert post(f"{address}/get_reward?token=secret", {"query": ["Hello"]})[0] == 200
        with pytest.raises(RemoteError, match=r"HTTP 401.*set GRM_SERVE_TOKEN.*attempts: 1"):
            RemoteRewardModel(address)
        torch.testing.assert_close(RemoteRewardModel(address, token="secret").score(CHATS), model.score(CHATS), **CLOSE)
        monkeypatch.setenv("GRM_SERVE_TOKEN", "secret")
        assert RemoteRewardModel(address).about["status"] == "ok"


def test_a_body_above_the_limit_is_not_read(model):
    with serving(Ensemble(["a"], [model]), max_body=2000) as address:
        assert post(f"{address}/score", {"conversations": CHATS})[0] == 200
        status, found = post(f"{address}/score", {"conversations": CHATS * 20})
        assert status == 413 and "more than 2000 bytes" in found["error"]
        with pytest.raises(DataError, match="more than 2000 bytes"):
            RemoteRewardModel(address).score(CHATS * 20)
        chunked = urllib.request.Request(f"{address}/score", iter([b"x" * 1500] * 2), {"Transfer-Encoding": "chunked"})
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(chunked, timeout=60)


def test_a_client_that_is_still_sending_is_told_the_limit(model):
    long = [{"role": "user", "content": "x" * (12 << 20)}, CHATS[0][-1]]
    with serving(Ensemble(["a"], [model]), max_body=4 << 20) as address:
        with pytest.raises(DataError, match=f"more than {4 << 20} bytes"):
            RemoteRewardModel(address).score([long])
        with pytest.raises(DataError, match="limit|more than"):  # above READ_AT_MOST times the limit
            RemoteRewardModel(address).score([long] * 2)


def test_a_fault_of_the_server_is_no_reward(tokenizer_path):
    broken = tiny_reward_model(tokenizer_path, "mlp")
    torch.nn.init.constant_(next(broken.head.parameters()), float("nan"))
    with serving(Ensemble(["broken"], [broken])) as address:
        status, found = post(f"{address}/score", {"conversations": CHATS})
        assert status == 500 and "not finite" in found["error"]
        with pytest.raises(RemoteError, match="HTTP 500.*not finite"):
            RemoteRewardModel(address, retries=0).score(CHATS)


def test_an_ensemble_standardises_and_combines(model):
    other = nudged(model, 7, size=0.05)
    other.mean, other.std = -1.0, 0.5
    with serving(Ensemble(["a", "b"], [model, other], combine="min")) as address:
        status, found = post(f"{address}/score", {"conversations": MANY})
        remote = RemoteRewardModel(address)
        about, rewards = remote.about, remote.score(MANY)
    members = torch.stack([(model.score(MANY) - 0.25) / 2.0, (other.score(MANY) + 1.0) / 0.5])
    assert status == 200
    torch.testing.assert_close(torch.tensor(found["members"]), members, **CLOSE)
    torch.testing.assert_close(rewards, minimum(members), **CLOSE)
    assert (about["combine"], about["mean"], about["std"]) == ("min", None, None)
    assert [(m["mean"], m["std"]) for m in about["models"]] == [(0.25, 2.0), (-1.0, 0.5)]
    with pytest.raises(DataError, match="no mean and std"):
        remote.normalise(rewards)


def test_ensembles_that_have_no_scale_or_tokenizer_in_common_are_refused(model):
    fresh = nudged(model, 8)
    fresh.mean, fresh.std = 0.0, 1.0
    with pytest.raises(ArtefactError, match="--calibrate"):
        Ensemble(["a", "fresh"], [model, fresh])
    assert Ensemble(["fresh"], [fresh]).about()["mean"] == 0.0
    fresh.tokenizer = type("Tokenizer", (), {"fingerprint": "another"})()
    with pytest.raises(ArtefactError, match="another tokenizer"):
        Ensemble(["a", "fresh"], [model, fresh])
    with pytest.raises(DataError, match="no combiner"):
        Ensemble(["a"], [model], combine="max")


def test_a_normalised_model(model):
    with serving(Ensemble(["a"], [model], normalise=True)) as address:
        remote = RemoteRewardModel(address)
        torch.testing.assert_close(remote.score(CHATS), model.normalise(model.score(CHATS)), **CLOSE)
        assert (remote.mean, remote.std) == (0.0, 1.0)


def test_the_queue_scores_together_what_waits_and_keeps_faults_apart():
    entered, go, calls = threading.Event(), threading.Event(), []

    def score(rows):
        calls.append(len(rows))
        entered.set()
        assert go.wait(30)
        if ((), (13,)) in rows:
            raise DataError("unlucky")
        return torch.tensor([[float(sum(response)) for _, response in rows]])

    queue = ScoringQueue(score, batch_tokens=1)  # so that 8 tokens go in one call
    first = queue.submit([((), (1,))])
    assert entered.wait(30)
    waiting = [queue.submit([((), (n,)), ((), (n, n))]) for n in (2, 13, 3, 4)]
    go.set()
    queue.close()
    assert first.result().tolist() == [[1.0]]
    assert [f.result().tolist() for f in (waiting[0], *waiting[2:])] == [[[2.0, 4.0]], [[3.0, 6.0]], [[4.0, 8.0]]]
    with pytest.raises(DataError, match="unlucky"):
        waiting[1].result()
    assert calls == [1, 6, 2, 2, 2, 2]  # three requests are 9 tokens; they fail and go alone; then the last
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit([])


def test_a_server_with_another_tokenizer_is_refused(url):
    with pytest.raises(ArtefactError, match="not 0123"):
        RemoteRewardModel(url, tokenizer="0123")


def test_the_reader_is_safe_between_threads(model):
    reader, body = RowReader(model.reader), {"conversations": MANY}
    expected = reader.conversations(body)
    with ThreadPoolExecutor(8) as pool:
        assert all(rows == expected for rows in pool.map(lambda _: reader.conversations(body), range(64)))
    with pytest.raises(BadRequest, match="conversations"):
        reader.conversations(None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node7", ""])
def test_no_server_is_open_to_other_machines_without_a_token(host, monkeypatch):
    monkeypatch.delenv("GRM_SERVE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="lets other machines ask: set GRM_SERVE_TOKEN"):
        main(["no-such-model", "--host", host])
    monkeypatch.setenv("GRM_SERVE_TOKEN", "hush")
    with pytest.raises(ArtefactError, match="no-such-model"):
        main(["no-such-model", "--host", host])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_the_own_machine_needs_no_token(host, monkeypatch):
    monkeypatch.delenv("GRM_SERVE_TOKEN", raising=False)
    with pytest.raises(ArtefactError, match="no-such-model"):
        main(["no-such-model", "--host", host])
