"""Seconds of counted work from what was measured on this machine, and the file in which that is kept."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from core.config import Config
from core.files import digest, file_digest, read_json
from core.machine import code_version, package_versions
from pipelines.plan import work
from pipelines.plan.fits import fit_passes, non_negative, pass_features, predicted
from pipelines.plan.rates import Rates
from pipelines.plan.shapes import Shape

FORMAT = 1
"""Of the file; raised when older measurements no longer fit."""
BUSY = 0.5
"""Processes that run before a measurement begins, a core, from which on it is said that the machine was busy."""


class Measured:
    """What probes found (`pipelines.plan.probes`), as rates.

    Args:
        groups: number of ranks -> what a program of so many ranks found.
        basis: what the seconds rest on, for people.
        shape: of the model that was measured; others are scaled by their parameters, which is said in `scaled`.
        fallback: for work that was not measured.

    Attributes:
        missing: kinds of work that `fallback` answered for.
        scaled: names of models whose rates were scaled.
    """

    def __init__(self, groups: Mapping[int, Mapping[str, Any]], basis: str, shape: Shape, fallback: Rates):
        self.groups, self.basis, self.shape, self._fallback = dict(groups), basis, shape, fallback
        self.missing: set[str] = set()
        self.scaled: set[str] = set()

    def seconds(self, item: work.Item) -> float:
        found = self._seconds(item)
        if found is None:
            self.missing.add(
                type(item).__name__.lower() + (f" on {item.ranks} ranks" if hasattr(item, "ranks") else "")
            )
            return self._fallback.seconds(item)
        return found

    def remarks(self) -> list[str]:
        lines = [f"{name}: scaled from {self.shape.name} by parameters" for name in sorted(self.scaled)]
        if self.missing:
            lines.append(f"not measured, from a rough matrix product: {', '.join(sorted(self.missing))}")
        return lines

    def _seconds(self, item: work.Item) -> float | None:
        group = self._group(getattr(item, "ranks", 1))
        match item:
            case work.Fixed():
                return item.seconds
            case work.Pass():
                k = self._passes.get((item.ranks, item.trained or "forward", item.zero))
                k = k or self._passes.get((item.ranks, item.trained or "forward", None))
                if k is None:
                    return None
                features = pass_features(item.tokens, item.length, item.layers)
                return item.calls * predicted(k, features) * self._scale(item.shape, "linear_params")
            case work.Logits():
                k = self._logits.get((item.ranks, "backward" if item.backward else "forward"))
                if k is None:
                    return None
                one = predicted(k, [1, item.tokens]) * self._scale(item.shape, "head_params")
                if item.zero == 3:  # the head is gathered, once more for the backward pass
                    gather = _of_zero(group.get("gather", {}), 3) or 0.0
                    one += (1 + item.backward) * item.shape.head_params * gather
                return item.calls * one
            case work.Update():
                rate = _of_zero(group.get("update", {}), item.zero)
                return None if rate is None else item.calls * item.params * rate
            case work.Sample():
                if item.ranks not in self._samples:
                    return None
                features = [item.steps, item.tokens, item.prefill]
                scale = self._scale(item.shape, "params")
                return item.calls * predicted(self._samples[item.ranks], features) * scale
            case work.Read():
                rate = group.get("read")
                return None if rate is None else item.calls * item.tokens * rate * self._scale(item.shape, "params")
            case work.Gather():
                rate = _of_zero(group.get("sync" if item.to_vllm else "gather", {}), item.zero)
                return None if rate is None else item.calls * item.shape.params * rate
            case work.Kl():
                rate = group.get("kl")
                return None if rate is None else item.tokens * rate * self._scale(item.shape, "head_params")
            case work.Judge():
                return None if "judge" not in group else item.samples * group["judge"]
            case work.Load():
                return None if "load" not in group else item.calls * item.params * group["load"]
            case work.Start():
                seconds = group.get("starts", {}).get(item.what)
                return None if seconds is None else item.count * seconds
            case work.Write():
                rate = self._group(1).get("write")
                return None if rate is None else item.bytes * rate
        raise AssertionError(f"unknown work {item}")

    def _group(self, ranks: int) -> Mapping[str, Any]:
        return self.groups.get(ranks, {})

    def _scale(self, shape: Shape, part: Literal["linear_params", "head_params", "params"]) -> float:
        """What a model of another size costs, as a multiple of the measured one: by parameters of a part.

        Layers are counted in the work, so models of one width differ in what stands outside the layers only.
        """
        if (shape.hidden, shape.linear_params) != (self.shape.hidden, self.shape.linear_params):
            self.scaled.add(shape.name)
        return getattr(shape, part) / getattr(self.shape, part)

    @cached_property
    def _passes(self) -> dict[tuple[int, str, int | None], list[float]]:
        found: dict[tuple[int, str, int | None], list[dict]] = {}
        for ranks, group in self.groups.items():
            for point in group["passes"]:
                found.setdefault((ranks, point["kind"], point["zero"]), []).append(point)
        return {key: fit_passes(points) for key, points in found.items()}

    @cached_property
    def _logits(self) -> dict[tuple[int, str], list[float]]:
        found: dict[tuple[int, str], list[dict]] = {}
        for ranks, group in self.groups.items():
            for point in group["logits"]:
                found.setdefault((ranks, point["kind"]), []).append(point)
        return {
            key: non_negative([[1, p["tokens"]] for p in points], [p["seconds"] for p in points])
            for key, points in found.items()
        }

    @cached_property
    def _samples(self) -> dict[int, list[float]]:
        return {
            ranks: non_negative(
                [sample_features(p) for p in group["samples"]], [p["seconds"] for p in group["samples"]]
            )
            for ranks, group in self.groups.items()
            if group.get("samples")
        }

    @property
    def responses(self) -> tuple[list[int], int] | None:
        """(lengths of responses that were sampled, where they were cut off)."""
        for group in self.groups.values():
            if "responses" in group:
                return group["responses"], group["responses_cut_at"]
        return None


def _of_zero(rates: Mapping[str, float], zero: int | None) -> float | None:
    """The rate of a ZeRO stage; where that was not measured, of another one."""
    return rates.get("none" if zero is None else str(zero), next(iter(rates.values()), None))


def sample_features(point: Mapping[str, Any]) -> list[float]:
    """Decoding steps, new tokens and computed prompt tokens of a timed call of `generate`."""
    rest = min(point["prompt_tokens"], 1 + point["prompt_tokens"] % point.get("block", 32))
    prefill = point["prompts"] * point["prompt_tokens"] + (point["sequences"] - point["prompts"]) * rest
    return [point["steps"], point["tokens"], prefill]


def machine() -> dict[str, Any]:
    """What a measurement holds for: processor, cores, memory, GPU."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "stepping"))][:2]
    flags = {"avx512_bf16", "amx_bf16"} & set(" ".join(line for line in lines if line.startswith("flags")).split())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": " ".join(named) or platform.processor(),
        "instructions": sorted(flags),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "gpus": gpus,
    }


def cache_key(cfg: Config) -> str:
    """Of what a measurement depends on: machine, number types, versions of the libraries, the model's config.json."""
    file = Path(cfg.policy.path) / "config.json"
    return digest(
        [
            FORMAT, machine(), package_versions(), cfg.engine.dtype, cfg.generation.vllm.dtype, cfg.policy.attention,
            Path(cfg.policy.path).name, file_digest(file) if file.is_file() else cfg.policy.revision,
        ]
    )  # fmt: skip


def cache_file(cfg: Config, folder: Path | None) -> Path:
    """Where the measurement for this configuration is kept.

    Args:
        folder: None: `grm/plan` in the XDG cache folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (folder or base / "grm" / "plan") / f"{cache_key(cfg)}.json"


def read(file: Path, names: Sequence[str]) -> tuple[dict[int, dict], list[str], list[str]]:
    """(number of ranks -> what was found, names that are not there, what to say of the measurement)."""
    kept: dict[str, Any] = read_json(file) if file.is_file() else {"groups": {}}
    found = {kept["groups"][name]["ranks"]: kept["groups"][name] for name in names if name in kept["groups"]}
    absent = [name for name in names if name not in kept["groups"]]
    return found, absent, _notes(kept) if found else []


def _notes(kept: Mapping[str, Any]) -> list[str]:
    """What makes a measurement less than it should be."""
    then, now = kept.get("code", {}).get("git_sha", ""), code_version().get("git_sha", "")
    notes = []
    if now and then != now:
        notes.append(f"the code was {then[:10] or 'unknown'} then and is {now[:10]} now")
    if kept.get("load", 0.0) > BUSY * len(os.sched_getaffinity(0)):
        notes.append(f"other work ran on the machine meanwhile (load {kept['load']:g})")
    return [f"{'; '.join(notes)}: --measure again"] if notes else []
