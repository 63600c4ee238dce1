"""Ranks: joining the process group, and sums and rows over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from core import whereabouts
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
    limit = whereabouts.timeout()
    options: dict[str, Any] = {"timeout": timedelta(seconds=limit)} if limit else {}
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False, **options)


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


def numbers(rows: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Scalars on the device as Python numbers, all read at once, since each reading waits for the GPU."""
    flat = [value.detach().double() for row in rows for value in row.values()]
    read = iter(torch.stack(flat).tolist() if flat else ())
    return [{name: next(read) for name in row} for row in rows]


def global_max(value: float) -> float:
    """The largest of all ranks' values, in float64. Every rank must call it; the values must be finite."""
    largest = torch.tensor(value, dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


class NotFinite(DataError):
    """Numbers that are NaN or infinite; raised on all ranks together.

    Attributes:
        where: stage and step.
        name: of the tensor that was computed first of those that are not finite.
        rank: the first rank that has such numbers.
        parts: which of its tensors, by number.
        prompts: ids of the prompts that they belong to, of all ranks.
    """

    together = True

    def __init__(self, message: str, *, where: str, name: str, rank: int, parts: list[int], prompts: list[str]):
        super().__init__(message)
        self.where, self.name, self.rank, self.parts, self.prompts = where, name, rank, parts, prompts


def check_finite(
    where: str,
    values: Mapping[str, Iterable[torch.Tensor | float]],
    advice: str,
    prompts: Sequence[Sequence[str]] = (),
) -> None:
    """Stop all ranks if any number of any rank is NaN or infinite. Every rank must call it, with the same names.

    Comparisons with NaN are false and a maximum may pass over it, so no other check can be trusted to notice it.

    Args:
        where: stage and step, the beginning of the message.
        values: name in the plural -> tensors of any shapes, or numbers; in the order in which they were computed.
        advice: what the user can do, the end of the message.
        prompts: for each tensor of a name, the ids of the prompts of its rows; of a number, those that it is made from.

    Raises:
        NotFinite: on every rank; tells the first of `values` that is not finite, the rank, and the prompts.
    """
    parts_of = {name: [torch.as_tensor(tensor) for tensor in tensors] for name, tensors in values.items()}
    counts = iter(_not_finite([part for parts in parts_of.values() for part in parts]))
    counts_of = {name: [next(counts) for _ in parts] for name, parts in parts_of.items()}
    bad = [float(sum(found)) for found in counts_of.values()]
    totals = global_sum(*bad, *(sum(part.numel() for part in parts) for parts in parts_of.values()))
    for i, (name, count, size) in enumerate(zip(values, totals, totals[len(bad) :], strict=False)):
        if count:
            mine = [k for k, found in enumerate(counts_of[name]) if found]
            ids = [p for k in mine if k < len(prompts) for p in _prompts(parts_of[name][k], prompts[k])]
            ranks = gather_rows([(rank(), mine, ids)] if bad[i] else [])
            named = list(dict.fromkeys(p for _, _, found in ranks for p in found))
            on = f", {of_ranks([r for r, _, _ in ranks])}" if world_size() > 1 else ""
            told = f", of {_listed('prompt', named)}" if named else ""
            raise NotFinite(
                f"{where}: {count:.0f} of {size:.0f} {name} are NaN or infinite{on}{told}. {advice}",
                where=where, name=name, rank=ranks[0][0], parts=ranks[0][1], prompts=named,
            )  # fmt: skip


def _not_finite(parts: list[torch.Tensor]) -> list[int]:
    """How many numbers of each are not. One pass over them where all are: their sum then is, unless it overflows."""
    sums = [part.sum(dtype=torch.promote_types(part.dtype, torch.float32)).isfinite() for part in parts]
    on_gpu = [fine for fine in sums if fine.is_cuda]
    read = iter(torch.stack(on_gpu).tolist() if on_gpu else ())  # all at once: each reading waits for the GPU
    whole = [next(read) if fine.is_cuda else bool(fine) for fine in sums]
    return [0 if fine else int((~part.isfinite()).sum()) for fine, part in zip(whole, parts, strict=True)]


def _prompts(part: torch.Tensor, ids: Sequence[str]) -> list[str]:
    """The prompts of the rows that are not finite; all of them where the tensor has no rows of theirs."""
    if part.dim() == 0 or len(part) != len(ids):
        return list(ids)
    bad = ~part.isfinite().reshape(len(part), -1).all(-1)
    return [prompt for prompt, is_bad in zip(ids, bad.tolist(), strict=True) if is_bad]


def of_ranks(numbers: Sequence[int]) -> str:
    """ "on rank 1", "on ranks 0, 3" """
    return f"on {_listed('rank', [str(number) for number in numbers])}"


def _listed(word: str, names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{word}{'s' if len(names) > 1 else ''} {', '.join(names[:most])}{more}"


def gather_rows(rows: list) -> list:
    """The rows of all ranks, in the order of ranks, on every rank. Every rank must call it."""
    if world_size() == 1:
        return rows
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
