"""New weights to vLLM servers over NCCL, by vLLM's own weight transfer. Needs GPUs on both sides; not run so far.

Rank 0 of the PPO run and the workers of all servers are one NCCL group. ZeRO-3 shards are gathered one parameter at a
time and broadcast as they come, so no rank ever holds the whole model.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
from torch import Tensor

from core.errors import DataError
from core.training import distributed
from core.training.weights import NamedWeights

Ask = Callable[[str, str, dict | None], object]
"""(server, path, body or None) -> the JSON answered; DataError names the server."""


class Fleet:
    """Several servers as the one that vLLM's trainer side talks to: its client protocol, with a call to all at once."""

    def __init__(self, urls: Sequence[str], ask: Ask):
        self._urls, self._ask = urls, ask
        self._sizes = [ask(url, "/get_world_size", None)["world_size"] for url in urls]

    @property
    def workers(self) -> int:
        return sum(self._sizes)

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        """Workers are numbered through all servers; `rank_offset` is that of the first one."""
        offsets = [init_info["rank_offset"] + sum(self._sizes[:i]) for i in range(len(self._urls))]
        self._all("/init_weight_transfer_engine", [{"init_info": init_info | {"rank_offset": o}} for o in offsets])

    def start_weight_update(self) -> None:
        self._all("/start_weight_update", [{}] * len(self._urls))

    def update_weights(self, update_info: dict) -> None:
        self._all("/update_weights", [{"update_info": update_info}] * len(self._urls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("/finish_weight_update", [{"weight_version": weight_version}] * len(self._urls))

    def _all(self, path: str, bodies: list[dict]) -> None:
        # At once, since the servers wait for each other in NCCL.
        with ThreadPoolExecutor(len(self._urls)) as pool:
            list(pool.map(lambda url, body: self._ask(url, path, body), self._urls, bodies))


class Source:
    """vLLM's `WeightSource` over the weights of the moment; iterated by all ranks, since gathering is collective."""

    def __init__(self, skipped: Sequence[str]):
        self._skipped, self.weights = set(skipped), None

    def metadata(self) -> list:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(*about) for about in self.weights.metadata() if about[0] not in self._skipped]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in self.weights if name not in self._skipped)


class NcclTransfer:
    """Every rank makes one and calls `send`.

    Args:
        skipped: names that the servers do not have, as a tied LM head.
        timeout: seconds that a transfer may take.
    """

    def __init__(self, urls: Sequence[str], ask: Ask, *, skipped: Sequence[str], timeout: float):
        if not torch.cuda.is_available():
            raise DataError("ppo.weight_transfer nccl needs a GPU on the side that trains too: set it to file")
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        self._source, self._timeout, self._urls = Source(skipped), timeout, urls
        fleet = Fleet(urls, ask)
        address, port = free_address(urls[0])
        about = NCCLTrainerInitInfo(address, port, 1 + fleet.workers, rank=distributed.rank())
        self._sender = self._in_time(
            lambda: NCCLTrainerWeightTransferEngine.trainer_init(about, client=fleet, source=self._source)
        )

    def send(self, weights: NamedWeights) -> None:
        """DataError when it takes longer than the timeout; the group cannot be used any more then."""
        self._source.weights = weights
        self._in_time(self._sender.send_weights)

    def _in_time(self, work: Callable):
        """NCCL waits for ever for a peer that is gone: so in a thread that can be given up."""
        found, device = {}, torch.cuda.current_device()

        def run() -> None:
            torch.cuda.set_device(device)
            try:
                found["result"] = work()
            except BaseException as error:
                found["error"] = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            raise DataError(
                f"no weight transfer with {', '.join(self._urls)} within {self._timeout:g} s (ppo.server_timeout): "
                "does NCCL connect these machines (NCCL_SOCKET_IFNAME), and are all servers up?"
            )
        if "error" in found:
            raise found["error"]
        return found["result"]


def free_address(url: str) -> tuple[str, int]:
    """This machine's address on the way to a server, and a free port there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((urlsplit(url).hostname, 9))  # sends nothing
        address = way.getsockname()[0]
    with socket.socket() as free:
        free.bind((address, 0))
        return address, free.getsockname()[1]
