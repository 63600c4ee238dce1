"""What does not fit into memory, in words."""

from __future__ import annotations

from pipelines.plan.memory import GIB, PROCESS, Memory, Parts
from pipelines.plan.sizes import Sizes


def memory_warnings(
    sizes: Sizes, stage: str, memory: Memory, available: float, *, gpu: bool, host: float | None = None
) -> list[str]:
    """What will not do, one line each.

    Args:
        sizes: with the ranks of this stage.
        available: bytes of one GPU; on CPU of the whole machine.
        host: bytes of the host memory of a machine with GPUs; None: not known, and not checked.
    """
    ranks = sizes.ranks
    if not gpu:
        need = max(memory.total, memory.whole_on_host) * ranks
        if need <= available:
            return []
        return [f"{stage}: {ranks} rank(s) need {gib(need)} of host memory and the machine has {gib(available)}"]
    found = [line for parts in memory.moments if (line := _moment(sizes, stage, parts, available))]
    if host is not None and (need := ranks * (memory.whole_on_host + PROCESS)) > host:
        found.append(
            f"{stage}: {ranks} rank(s) read models through {gib(need)} of host memory, and there are {gib(host)}: "
            "start fewer ranks, shard the models (engine.zero_stage=3, engine.frozen_zero_stage=3), or take smaller "
            "ones"
        )
    weights = sizes.policy.params * sizes.bytes_per_sampler_weight
    share = sizes.cfg.generation.vllm.gpu_memory_utilization * available
    samples = stage in ("preferences", "bon", "eval") or (stage == "ppo" and not sizes.cfg.ppo.vllm_servers)
    if samples and kv_sequences(sizes, max(share - weights, 0.0)) < 1:
        found.append(
            f"{stage}: vLLM's share of {gib(share)} has no room for one sequence beside weights of {gib(weights)}: "
            "raise generation.vllm.gpu_memory_utilization"
        )
    return found


def _moment(sizes: Sizes, stage: str, parts: Parts, available: float) -> str | None:
    """The warning of one state of a stage on a GPU; None where it fits."""
    vllm = sum(n for name, n in parts.items() if "vLLM" in name)
    rest = sum(parts.values()) - vllm
    if vllm + rest <= available:
        return None
    if not vllm or stage != "ppo":
        return f"{stage}: a rank needs {gib(vllm + rest)} and a GPU has {gib(available)}"
    sleeps = sizes.cfg.generation.vllm.sleep
    return (
        f"ppo: vLLM ({gib(vllm)}) and the trainer ({gib(rest)}{' while it samples' if sleeps else ''}) do not fit "
        f"together into {gib(available)}: lower generation.vllm.gpu_memory_utilization"
        + ("" if sleeps else " or set generation.vllm.sleep")
    )


def kv_sequences(sizes: Sizes, room: float) -> float:
    """Sequences whose keys and values fit into `room` bytes."""
    shape = sizes.policy
    one = 2 * shape.layers * shape.kv_heads * shape.head_dim * sizes.bytes_per_sampler_weight
    return room / (one * (sizes.lengths.prompt_tokens + sizes.cfg.generation.max_new_tokens))


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
