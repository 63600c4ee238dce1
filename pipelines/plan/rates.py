"""Seconds of counted work from a machine's peaks, with stated shares of them that are reached."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from pipelines.plan import work


class Rates(Protocol):
    """What work costs on a machine."""

    @property
    def basis(self) -> str:
        """What the seconds rest on."""
        ...

    def seconds(self, item: work.Item) -> float: ...

    def remarks(self) -> list[str]:
        """What to say of the work that was asked for so far."""
        ...


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks of one device."""

    name: str
    flops: float
    """Dense bfloat16 operations a second."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To the other devices of the machine, bytes a second in one direction."""


GPUS = {
    device.name: device
    for device in (
        Device("H100", 989e12, 80e9, 3.35e12, 450e9),
        Device("H200", 989e12, 141e9, 4.8e12, 450e9),
        Device("A100", 312e12, 80e9, 2.039e12, 300e9),
        Device("L40S", 362e12, 48e9, 0.864e12, 32e9),
        Device("RTX4090", 165e12, 24e9, 1.008e12, 32e9),
    )
}
"""Peaks from the makers' data sheets: SXM boards with NVLink for H100, H200 and A100 (80 GB), PCIe 4.0 x16 for the
others."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of the peaks that are assumed to be reached, and what has no peak."""

    forward: float
    backward: float
    logits: float
    bandwidth: float
    """Of reading weights and KV cache while decoding."""
    link: float
    layer: float
    """Seconds that one layer takes at least in a forward pass: kernels have to be started."""
    decoding_layer: float
    """The same in vLLM's decoding without CUDA graphs."""
    starts: dict[str, float]
    """Seconds. Of vLLM: without CUDA graphs."""
    graphs: float
    """Seconds more to start vLLM with CUDA graphs."""
    load: float
    """Bytes a second, from disk."""
    write: float
    judge: float
    """Responses a second."""


ON_GPU = Shares(
    forward=0.45, backward=0.4, logits=0.5, bandwidth=0.6, link=0.6, layer=150e-6,
    decoding_layer=600e-6, graphs=40,  # 600e-6, and 20 s for vLLM below: docs/gpu.md; 40 s more are assumed
    starts={"command": 5, "process": 10, "tokenizer": 5, "vllm": 20, "deepspeed": 10, "engine": 3, "judge": 3},
    load=1e9, write=1e9, judge=2000,
)  # fmt: skip
ON_CPU = Shares(
    forward=0.5, backward=0.4, logits=0.25, bandwidth=0.4, link=0.3, layer=300e-6, decoding_layer=300e-6, graphs=0,
    starts={"command": 5, "process": 6, "tokenizer": 4, "vllm": 15, "deepspeed": 6, "engine": 2, "judge": 2},
    load=0.2e9, write=0.5e9, judge=100,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FromPeaks:
    """Work over peaks.

    A pass takes its FLOPs over the share of the peak, or the time to start its kernels if that is longer, and at ZeRO
    stage 3 the gathering of its weights besides, which is not assumed to overlap. A decoding step reads all weights and
    the keys and values of its sequences once, or computes 2 x parameters x sequences FLOPs if that takes longer.

    """

    device: Device
    shares: Shares
    basis: str
    bytes_per_weight: int = 2
    shared: bool = False
    """All ranks work on one device, and share its peaks."""

    def seconds(self, item: work.Item) -> float:
        device, shares, size = self.device, self.shares, self.bytes_per_weight
        match item:
            case work.Pass():
                share = shares.backward if item.trained else shares.forward
                kernels = item.calls * item.layers * shares.layer * (3 if item.trained else 1)
                gathers = item.calls * item.layers * (2 if item.trained else 1) if item.zero == 3 else 0.0
                moved = gathers * item.shape.layer_params * size
                if item.zero is not None and item.trained:  # gradients
                    moved += item.calls * item.layers * item.shape.layer_params * size
                compute = item.flops / (share * device.flops) * self._side_by_side(item.ranks)
                return max(compute, kernels) + self._communication(moved, item.ranks)
            case work.Logits():
                moved = item.calls * item.shape.head_params * size * (1 + item.backward) if item.zero == 3 else 0.0
                compute = item.flops / (shares.logits * device.flops) * self._side_by_side(item.ranks)
                return compute + self._communication(moved, item.ranks)
            case work.Update():
                held = item.params / (item.ranks if item.zero else 1) * self._side_by_side(item.ranks)
                return item.calls * held * 28 / (shares.bandwidth * device.bandwidth)  # reads and writes of AdamW
            case work.Sample():
                return self._sample(item)
            case work.Read():
                flops = 2 * item.shape.params * item.calls * item.tokens
                return flops / (shares.forward * device.flops) * self._side_by_side(item.ranks)
            case work.Gather():
                moved = item.calls * item.shape.params * size
                local = moved * 3 / (shares.bandwidth * device.bandwidth) * self._side_by_side(item.ranks)
                return local + (self._communication(moved, item.ranks) if item.zero == 3 else 0.0)
            case work.Kl():
                flops = 2 * 2 * item.shape.head_params * item.tokens * self._side_by_side(item.ranks)
                return flops / (shares.logits * device.flops)
            case work.Judge():
                return item.samples / shares.judge * self._side_by_side(item.ranks)
            case work.Load():
                return item.calls * item.params * size / shares.load * self._side_by_side(item.ranks)
            case work.Start():
                return item.count * (shares.starts[item.what] + shares.graphs * item.graphs)
            case work.Write():
                return item.bytes / shares.write
            case work.Fixed():
                return item.seconds
        raise AssertionError(f"unknown work {item}")

    def remarks(self) -> list[str]:
        return []

    def named(self, basis: str) -> FromPeaks:
        return replace(self, basis=basis)

    def _side_by_side(self, ranks: int) -> int:
        return ranks if self.shared else 1

    def _communication(self, moved: float, ranks: int) -> float:
        """Seconds to gather or scatter `moved` bytes over the ranks."""
        return moved * (ranks - 1) / ranks / (self.shares.link * self.device.link) if ranks > 1 else 0.0

    def _sample(self, item: work.Sample) -> float:
        device, shares, shape, size = self.device, self.shares, item.shape, self.bytes_per_weight
        together = min(item.sequences, item.concurrency)
        context = item.prompt_tokens + item.new_tokens / 2
        cached = together * context * 2 * shape.layers * shape.kv_heads * shape.head_dim * size
        reading = (shape.params * size + cached) / (shares.bandwidth * device.bandwidth)
        computing = 2 * shape.params * together / (shares.forward * device.flops)
        kernels = shape.layers * (shares.layer if item.graphs else shares.decoding_layer)
        step = max(reading, computing) * self._side_by_side(item.ranks) + kernels
        prefill = 2 * shape.params * item.prefill / (shares.forward * device.flops) * self._side_by_side(item.ranks)
        return item.calls * (item.steps * step + prefill)


def rough(dtype: str, *, measure: bool = True) -> FromPeaks:
    """This machine's CPU, by a matrix product and a copy that are timed for two seconds.

    Args:
        measure: False times them for a moment only, where little rests on it.
    """
    kind = getattr(torch, dtype)
    a, b = torch.randn(1024, 1024).to(kind), torch.randn(1024, 1024).to(kind)
    large = torch.zeros(1 << 26, dtype=torch.uint8)
    product = _least(lambda: a @ b, 1.0 if measure else 0.1)
    copy = _least(lambda: large.clone(), 1.0 if measure else 0.1)
    # A copy reads and writes; other ranks are on the same memory, so what they pass each other is copied twice.
    device = Device("cpu", 2 * 1024**3 / product, float(_memory()), 2 * len(large) / copy, len(large) / copy / 2)
    basis = f"rough: a matrix product of {device.flops / 1e9:.0f} GFLOP/s timed just now, and assumed shares of it"
    return FromPeaks(device, ON_CPU, basis, 2 if dtype == "bfloat16" else 4, shared=True)


def _least(call: Callable[[], object], seconds: float) -> float:
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
