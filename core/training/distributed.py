"""Ranks: joining the process group, and sums and rows over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from core.errors import DataError
from core.ranks import free_port


def init_distributed() -> None:
    """Join the process group of torchrun; without a launcher, make a group of this process alone.

    Does nothing the second time.
    """
    import deepspeed

    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # Else DeepSpeed compiles an operation for minutes: all-reduces of its tensor-parallel inference, not used here.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)


def rank() -> int:
    """Number of this process, from 0; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def global_sum(*values: float) -> list[float]:
    """Each value summed over all ranks, in float64. Every rank must call it, with equally many values."""
    total = torch.tensor(values, dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def global_max(value: float) -> float:
    """The largest of all ranks' values, in float64. Every rank must call it; the values must be finite."""
    largest = torch.tensor(value, dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def check_finite(where: str, values: Mapping[str, Iterable[torch.Tensor | float]], advice: str) -> None:
    """Stop all ranks if any number of any rank is NaN or infinite. Every rank must call it, with the same names.

    Comparisons with NaN are false and a maximum may pass over it, so no other check can be trusted to notice it.

    Args:
        where: stage and step, the beginning of the message.
        values: name in the plural -> tensors of any shapes, or numbers; in the order in which they were computed.
        advice: what the user can do, the end of the message.

    Raises:
        DataError: on every rank; names the first of `values` that is not finite.
    """
    bad, sizes = [], []
    for tensors in values.values():
        parts = [torch.as_tensor(tensor) for tensor in tensors]
        bad.append(float(sum((~part.isfinite()).sum() for part in parts)))
        sizes.append(sum(part.numel() for part in parts))
    totals = global_sum(*bad, *sizes)
    for name, count, size in zip(values, totals, totals[len(bad) :], strict=False):
        if count:
            raise DataError(f"{where}: {count:.0f} of {size:.0f} {name} are NaN or infinite. {advice}")


def gather_rows(rows: list) -> list:
    """The rows of all ranks, in the order of ranks, on every rank. Every rank must call it."""
    if world_size() == 1:
        return rows
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
