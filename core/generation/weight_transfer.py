"""New weights to vLLM servers over NCCL, by vLLM's own weight transfer. Needs GPUs on both sides; not run so far.

Rank 0 of the PPO run and the workers of all servers form one NCCL group. ZeRO-3 shards are gathered one parameter at a
time and broadcast as they come, so no rank ever holds the whole model.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from core.errors import DataError
from core.training import distributed
from core.training.weights import NamedWeights

Ask = Callable[[str, str, dict | None], Any]
"""(server, path, body or None) -> the JSON of the answer. Raises DataError, which names the server."""


class Fleet:
    """Several servers as one: the client protocol of vLLM's weight transfer, each call made to all servers at once.

    Args:
        ask: makes one request.
    """

    def __init__(self, urls: Sequence[str], ask: Ask):
        self._urls, self._ask = urls, ask
        self._sizes = [ask(url, "/get_world_size", None)["world_size"] for url in urls]

    @property
    def workers(self) -> int:
        """Workers of all servers together."""
        return sum(self._sizes)

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        """Make the NCCL group; workers are numbered through all servers, from `rank_offset` of `init_info` on."""
        offsets = [init_info["rank_offset"] + sum(self._sizes[:i]) for i in range(len(self._urls))]
        self._all("/init_weight_transfer_engine", [{"init_info": init_info | {"rank_offset": o}} for o in offsets])

    def start_weight_update(self) -> None:
        """Announce new weights."""
        self._all("/start_weight_update", [{}] * len(self._urls))

    def update_weights(self, update_info: dict) -> None:
        """Let the servers receive the weights that `update_info` describes."""
        self._all("/update_weights", [{"update_info": update_info}] * len(self._urls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the servers use the new weights."""
        self._all("/finish_weight_update", [{"weight_version": weight_version}] * len(self._urls))

    def _all(self, path: str, bodies: list[dict]) -> None:
        # All at once, since the servers wait for each other in NCCL.
        with ThreadPoolExecutor(len(self._urls)) as pool:
            list(pool.map(lambda url, body: self._ask(url, path, body), self._urls, bodies))


class Source:
    """The current weights as a `WeightSource` of vLLM. All ranks iterate over it, since all ranks gather them.

    Args:
        skipped: names that the servers do not have.

    Attributes:
        weights: the weights to send next; set it before each transfer.
    """

    def __init__(self, skipped: Sequence[str]):
        self._skipped = set(skipped)
        self.weights: NamedWeights

    def metadata(self) -> list:
        """Name, type and shape of what iterating gives, in its order."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(*about) for about in self.weights.metadata() if about[0] not in self._skipped]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in self.weights if name not in self._skipped)


class NcclTransfer:
    """Sends weights to all servers. Every rank makes one and calls `send`.

    Args:
        skipped: names that the servers do not have, such as a tied LM head.
        timeout: seconds that a transfer may take.

    Raises:
        DataError: no GPU on this side, or the group is not complete within the timeout.
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
        """Send these weights.

        Raises:
            DataError: it took longer than the timeout; the group cannot be used after that.
        """
        self._source.weights = weights
        self._in_time(self._sender.send_weights)

    def _in_time(self, work: Callable):
        """Run `work` in a thread that can be abandoned, since NCCL waits forever for a peer that is gone."""
        outcome: dict[str, Any] = {}
        device = torch.cuda.current_device()

        def run() -> None:
            torch.cuda.set_device(device)
            try:
                outcome["result"] = work()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            raise DataError(
                f"no weight transfer with {', '.join(self._urls)} within {self._timeout:g} s (ppo.server_timeout): "
                "are all servers up, and does NCCL connect these machines (NCCL_SOCKET_IFNAME)?"
            )
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]


def free_address(url: str) -> tuple[str, int]:
    """The address of this machine on its route to a server, and a free port at that address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((urlsplit(url).hostname, 9))  # sends nothing
        address = route.getsockname()[0]
    with socket.socket() as free:
        free.bind((address, 0))
        return address, free.getsockname()[1]
