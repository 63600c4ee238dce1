"""What can be shown of the transfer over NCCL without a GPU: numbers of workers, order of calls, what is announced."""

import threading

import pytest
import torch

from core import config
from core.errors import DataError
from core.generation.weight_transfer import Fleet, NcclTransfer, Source, free_address
from core.models.lora import add_lora
from core.training.weights import NamedWeights
from tests.builders.tiny_lm import tiny_lm

SIZES = {"http://a": 2, "http://b": 1, "http://c": 4}


def test_workers_of_all_servers_are_numbered_and_called_at_once():
    together, calls = threading.Barrier(len(SIZES), timeout=10), []

    def ask(url: str, path: str, body: dict | None):
        if path == "/get_world_size":
            return {"world_size": SIZES[url]}
        together.wait()  # servers wait for each other in NCCL: one after the other would hang here
        calls.append((url, path, body))
        return None

    fleet = Fleet(list(SIZES), ask)
    assert fleet.workers == 7
    fleet.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    offsets = {url: body["init_info"]["rank_offset"] for url, _, body in calls}
    assert offsets == {"http://a": 1, "http://b": 3, "http://c": 4}
    fleet.start_weight_update()
    fleet.update_weights({"names": ["w"]})
    fleet.finish_weight_update()
    paths = [path for _, path, _ in calls[3:]]
    assert paths == [p for p in ("/start_weight_update", "/update_weights", "/finish_weight_update") for _ in SIZES]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, config.Lora(rank=2, targets=("q_proj", "up_proj"))])
def test_what_is_announced_is_what_comes(lora):
    """vLLM cuts its buffers by the metadata: another order, type or shape would hang or load garbage."""
    lm = tiny_lm(1)
    names = [name for name, _ in lm.named_parameters()]
    source = Source(["lm_head.weight"])
    source.weights = NamedWeights(add_lora(lm, lora) if lora else lm, lambda: None)
    announced = [(m.name, m.dtype, m.shape) for m in source.metadata()]
    for _ in range(2):
        assert [(name, w.dtype, tuple(w.shape)) for name, w in source] == announced
    assert [name for name, *_ in announced] == [name for name in names if name != "lm_head.weight"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_option_is_named():
    with pytest.raises(DataError, match="ppo.weight_transfer nccl needs a GPU"):
        NcclTransfer(["http://127.0.0.1:9"], lambda *_: None, skipped=[], timeout=1)


def test_the_address_is_this_machines():
    address, port = free_address("http://127.0.0.1:8000")
    assert address == "127.0.0.1" and port > 0
