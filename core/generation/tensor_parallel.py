"""Ranks that hold one engine of vLLM together: `tensor_parallel_size` in `generation.vllm.overrides`.

Each rank has a part of every weight, and a scheduler of its own. So that the schedulers decide alike, all ranks of a
group must give the engine the same prompts in the same order, with the same random numbers. The group is made of
consecutive ranks, as vLLM makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist


class EngineGroup:
    """The ranks that hold this rank's engine. Make it once vLLM is there.

    Args:
        size: ranks of a group; 1 is an engine for each rank, which needs no process group.
    """

    def __init__(self, size: int):
        self._size, self._group = size, None
        if size > 1:
            from vllm.distributed.parallel_state import get_tp_group

            self._group = get_tp_group().cpu_group  # its objects need no GPU

    def first(self, value: Any) -> Any:
        """The value of the group's first rank, on all of them. All must call it."""
        return self._gathered(value)[0]

    def together(self, mine: Sequence, run: Callable[[list], list]) -> list:
        """What `run` makes of this rank's rows, when it is given those of all ranks of the group. All must call it."""
        of_ranks = self._gathered(list(mine))
        rows = [row for part in of_ranks for row in part]
        before = sum(map(len, of_ranks[: dist.get_group_rank(self._group, dist.get_rank())])) if self._group else 0
        return run(rows)[before : before + len(mine)]

    def _gathered(self, value: Any) -> list:
        if not self._group:
            return [value]
        parts: list = [None] * self._size
        dist.all_gather_object(parts, value, group=self._group)
        return parts


def use_gloo_on_cpu() -> None:
    """Let ranks on CPU exchange their parts over gloo; call it before vLLM starts.

    vLLM would use shared memory, whose name is the same for every run of a machine. A run that was killed leaves it
    behind, and then no other one starts.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda _: False
