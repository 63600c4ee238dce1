"""Generation by vLLM servers: what the client does where one is not there, drops a connection, or is slow."""

import threading
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from core.config import Generation, Model, Vllm
from core.data.chat import ChatTokenizer
from core.errors import DataError
from core.generation.remote import ONCE, NoAnswer, ServerGenerator
from core.generation.weight_transfer import Fleet
from tests.builders.servers.vllm import fake_vllm


@pytest.fixture
def two():
    with ExitStack() as stack:
        yield [stack.enter_context(fake_vllm()) for _ in range(2)]


@pytest.fixture
def connect(policy_path, tmp_path):
    model = Model(path=str(policy_path))
    tokenizer = ChatTokenizer(model)

    def make(servers, *, retries=0):
        urls = [getattr(server, "url", server) for server in servers]
        cfg = Generation(vllm=Vllm())
        return ServerGenerator(urls, model, cfg, tokenizer, folder=tmp_path / "sync", timeout=20, retries=retries)

    return make


WEIGHTS = {"model.norm.weight": torch.arange(3.0)}


def test_a_missing_server_is_named_by_its_address(connect):
    with pytest.raises(DataError, match=r"vLLM server http://127.0.0.1:9/v1/models: .*refused"):
        connect(["http://127.0.0.1:9/"])


@pytest.mark.parametrize("how", ["reset", "closed", "half"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/collective_rpc", "/reset_prefix_cache"])
def test_a_dropped_connection_is_no_lost_server(connect, two, tmp_path, how, path):
    first, second = two
    first.how, first.drops[path] = how, 1
    generator = connect(two, retries=1)
    assert [[c.token_ids for c in group] for group in generator.generate([[1, 2], [3]], n=2, seed=0)] == [[[7]] * 2] * 2
    generator.sync(WEIGHTS.items())
    assert first.count(path) == 2 and not generator.lost
    asked = [body for asked, body in first.seen if asked == path]
    assert asked[0] == asked[1]
    assert second.count("/v1/completions") == 0 and second.count("/collective_rpc") == 1


def test_the_second_time_the_server_is_lost(connect, two):
    first, second = two
    generator = connect(two, retries=1)
    first.drops["/v1/completions"] = 2
    assert generator.generate([[1]], seed=0)[0][0].token_ids == [7]
    assert list(generator.lost) == [first.url] and first.count("/v1/completions") == 2
    assert second.count("/v1/completions") == 1
    generator.sync(WEIGHTS.items())
    assert first.count("/collective_rpc") == 0


def test_without_retries_the_run_ends_with_its_name(connect, two):
    generator = connect(two)
    two[1].drops["/collective_rpc"] = 2
    with pytest.raises(NoAnswer, match=rf"vLLM server {two[1].url}/collective_rpc: "):
        generator.sync(WEIGHTS.items())


@pytest.mark.parametrize("path", sorted(ONCE))
def test_steps_of_a_transfer_are_not_repeated(connect, two, path):
    """A server that had the request would wait for a broadcast that the others have ended."""
    generator = connect(two, retries=1)
    fleet = Fleet(generator.urls, generator._ask)
    calls = {
        "/init_weight_transfer_engine": lambda: fleet.init_weight_transfer_engine({"rank_offset": 1}),
        "/start_weight_update": fleet.start_weight_update,
        "/update_weights": lambda: fleet.update_weights({}),
        "/finish_weight_update": fleet.finish_weight_update,
    }
    two[0].drops[path] = 1
    with pytest.raises(NoAnswer, match=rf"vLLM server {two[0].url}{path}: "):
        calls[path]()
    assert two[0].count(path) == 1


def test_all_servers_take_new_weights_at_the_same_time(connect, two, tmp_path):
    """Each server answers only when the other one has been asked too: one after the other would end in the timeout."""
    generator = connect(two)
    saw = {path: [threading.Event() for _ in two] for path in ("/collective_rpc", "/reset_prefix_cache")}
    alone, loaded = [], []

    def during(server: int, path: str) -> None:
        if path not in saw:
            return
        saw[path][server].set()
        if not saw[path][1 - server].wait(10):
            alone.append((server, path))
        if path == "/collective_rpc":
            loaded.append(load_file(two[server].seen[-1][1]["args"][0]))

    for number, server in enumerate(two):
        server.during = lambda path, number=number: during(number, path)
    generator.sync(WEIGHTS.items())
    assert not alone
    assert [found["model.norm.weight"].tolist() for found in loaded] == [[0.0, 1.0, 2.0]] * 2
    for server in two:  # the cache goes after the weights have come
        assert [path for path, _ in server.seen if path in saw] == list(saw)


def test_a_server_that_fails_in_a_sync_does_not_keep_the_others_from_it(connect, two):
    first, second = two
    generator = connect(two, retries=1)
    first.drops["/collective_rpc"] = 2
    generator.sync(WEIGHTS.items())
    assert list(generator.lost) == [first.url]
    assert second.count("/collective_rpc") == 1 and second.count("/reset_prefix_cache") == 1
    assert first.count("/reset_prefix_cache") == 0
    second.drops["/reset_prefix_cache"] = 2
    with pytest.raises(DataError, match="no vLLM server is left"):
        generator.sync(WEIGHTS.items())
