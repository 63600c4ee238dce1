"""Bytes that one rank of a stage needs at most, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from bon.scores import CACHED_STATES
from core.config import Engine
from core.models.logprobs import KEPT_LOGITS
from pipelines.plan.backbones import saved_params
from pipelines.plan.pools import SCORE_TOKENS
from pipelines.plan.shapes import Shape
from pipelines.plan.sizes import Part, Sizes
from pipelines.plan.training import cached_orders, ppo_micro, rm_caches, rm_pairs

GIB = 2**30
PROCESS = 1.2 * GIB
"""Of a rank before any model: Python, torch, DeepSpeed, vLLM's code; on a GPU its context."""

REDUCE_BUCKET = 500_000_000
"""Numbers in the bucket that DeepSpeed collects gradients in, unless `engine.overrides` says otherwise."""

PASSING = ("activations", "logits", "gradients", "optimiser step")
"""Parts that a trainer needs while it trains only."""


Parts = dict[str, float]
"""What is in memory -> bytes."""


@dataclass(frozen=True)
class Memory:
    """Of one rank in bytes: host memory on CPU, memory of its GPU on GPUs."""

    moments: tuple[Parts, ...]
    """One for each state of the stage that may be the largest."""
    whole_on_host: float = 0.0
    """Host memory that one rank needs for the models that it reads whole, before they are moved to a GPU. Of a model
    that is sharded while it is read, its largest layer."""

    @property
    def parts(self) -> Parts:
        """Of the moment that needs most."""
        return max(self.moments, key=lambda parts: sum(parts.values()))

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def activation_bytes(shape: Shape, length: float, *, kernel: str, size: int, lora: bool = False) -> float:
    """Bytes that one layer of Llama's kind keeps of a token for the backward pass.

    In the residual stream, norms (in float32), queries, keys and values: 8 b + 8 bytes per hidden dimension, where b is
    the size of a number (6 b + 8 where only adapters are trained). In the MLP 4 b per inner dimension. The eager kernel
    keeps scores and float32 probabilities, b (+ 4 in 16 bits) per head and position; sdpa keeps 4 per head.

    Args:
        length: of a row.
        size: bytes of a number, b.
    """
    stream = ((6 if lora else 8) * size + 8) * shape.hidden + 4 * size * shape.intermediate + 8
    if kernel == "eager":
        return stream + shape.heads * length * (size if size == 4 else size + 4)
    return stream + 4 * shape.heads - 2 * size * (shape.heads - shape.kv_heads) * shape.head_dim


def held(params: float, size: int, zero: int | None, ranks: int) -> float:
    """Bytes of weights that an engine holds between passes."""
    return params * size / (ranks if zero == 3 else 1)


def read_whole(shape: Shape, size: int, zero: int | None, ranks: int) -> float:
    """Bytes of a model that a rank has in memory whole while it reads it (`core.training.engine.shards`)."""
    return (max(shape.embedding_params, shape.layer_params) if zero == 3 and ranks > 1 else shape.params) * size


def trained_bytes(trained: float, settings: Engine, ranks: int, *, gpu: bool) -> dict[str, float]:
    """Gradients, optimiser states and buffers of an engine for what it trains.

    Gradients have the type of the weights, and are sharded from stage 2 on. In bfloat16 there are a float32 master copy
    and two moments, 12 bytes, sharded from stage 1 on, and while a step is made float32 gradients of what this rank
    updates. In float32 there are 12 bytes where DeepSpeed shards them, 8 where it does not. At stage 3 gradients are
    collected in a bucket of fixed size, which takes no room on CPU before it is written to.
    """
    zero, half = settings.zero_stage, settings.dtype == "bfloat16"
    share, size = trained / (ranks if zero >= 1 else 1), 2 if half else 4
    bucket = settings.overrides.get("zero_optimization", {}).get("reduce_bucket_size", REDUCE_BUCKET)
    return {
        "gradients": trained * size / (ranks if zero >= 2 else 1),
        "optimiser states": 0.0 if settings.offload and zero else (12 if half or zero >= 1 else 8) * share,
        "optimiser step": 4 * share if half else 0.0,
        "reduce bucket": float(bucket) * size if zero == 3 and gpu else 0.0,
    }


def logit_bytes(shape: Shape, tokens: float, *, float32: bool, backward: bool) -> float:
    """Logits of a call: as many as `KEPT_LOGITS` at once, and their gradient."""
    kept = min(tokens * shape.vocabulary, KEPT_LOGITS)
    return kept * (4 if float32 else 2) * (2 if backward else 1)


def activations(sizes: Sizes, shape: Shape, part: Part, tokens: float, length: float, settings: Engine) -> float:
    """Of a micro-batch in the layers that are trained."""
    kernel = "eager" if sizes.cfg.policy.attention == "eager" else "sdpa"
    size = sizes.bytes_per_weight
    one = tokens * activation_bytes(shape, length, kernel=kernel, size=size, lora=part.kind == "lora")
    if settings.gradient_checkpointing:  # the input of each layer, and all of the one that is computed again
        return part.trained * tokens * shape.hidden * size + one
    return part.trained * one


def sampler(sizes: Sizes, gpu_memory: float | None) -> dict[str, float]:
    """vLLM in one process."""
    vllm = sizes.cfg.generation.vllm
    if gpu_memory:
        return {"vLLM, weights and KV cache": vllm.gpu_memory_utilization * gpu_memory}
    return {
        "vLLM, weights": sizes.policy.params * sizes.bytes_per_sampler_weight,
        "vLLM, KV cache": vllm.cpu_kvcache_gib * GIB,
    }


def of_pools(sizes: Sizes, stage: str, gpu_memory: float | None) -> Memory:
    """preferences, bon, eval: the sampler (in eval beside policy and reference), later the models that score."""
    size = sizes.bytes_per_weight
    first = {"process": PROCESS, **sampler(sizes, gpu_memory)}
    members = sizes.cfg.ppo.members if stage == "eval" else tuple(sizes.cfg.rm.variants)
    if stage == "eval":
        first["policy and reference"] = 2 * sizes.policy.params * size
    if stage == "preferences":
        return Memory((first,), sizes.policy.params * size)
    second = {
        "process": PROCESS,
        "reward models": min(2, len(members)) * sizes.base.trunk_params * size,
        "passes": 4 * SCORE_TOKENS * (sizes.base.hidden + sizes.base.intermediate) * size,
    }
    if stage == "bon" and len(members) > 1:
        rows = sizes.lengths.prompts.get("eval", 0) if sizes.cfg.bon.prompts is None else sizes.cfg.bon.prompts
        states = rows * sizes.row(sizes.cfg.bon.samples) * sizes.base.hidden * size
        most = CACHED_STATES if not gpu_memory else 0.0
        second["states of shared layers"] = min(most, states) / sizes.ranks
    if sizes.gold:
        second["gold"] = sizes.gold.trunk_params * size
    return Memory((first, second), 2 * sizes.policy.params * size)


def of_rm(sizes: Sizes, gpu_memory: float | None) -> Memory:
    """The variant that needs most; the states of frozen layers are kept in host memory."""
    cfg, ranks, size, settings = sizes.cfg.rm, sizes.ranks, sizes.bytes_per_weight, sizes.cfg.engine_of("rm")
    found: list[Memory] = []
    for variant in cfg.variants.values():
        shape, part = sizes.variant_shape(variant), sizes.rm_part(variant)
        passes = cfg.global_batch // (cfg.micro_batch * ranks) or 1
        tokens = sizes.pair_batch(cfg.global_batch, ranks * passes)
        parts = {"process": PROCESS, "weights": held(sizes.rm_params(variant), size, sizes.rm_zero, ranks)}
        parts |= trained_bytes(sizes.rm_trained(variant), settings, ranks, gpu=bool(gpu_memory))
        parts["activations"] = activations(sizes, shape, part, tokens, sizes.pair_length, settings)
        if variant.regularises:
            read = cfg.micro_batch * sizes.lengths.pair_tokens[1]
            parts["logits"] = logit_bytes(shape, read, float32=settings.float32_head, backward=True)
        states = 0.0
        if rm_caches(sizes, variant):
            frozen = shape.layers - (cfg.trainable_layers or 0)
            parts["frozen layers"] = (frozen * shape.layer_params + shape.embedding_params) * size
            orders = cached_orders(sizes)
            share = 1 - (1 - 1 / ranks) ** orders
            rows = rm_pairs(sizes, variant) * share + sizes.lengths.pairs["rm_val"] / ranks
            states = (rows * sizes.pair_row + sizes.lengths.calibration * sizes.row(2) / ranks) * shape.hidden * size
            if not gpu_memory:
                parts["states of frozen layers"] = states
        zero = None if rm_caches(sizes, variant) else sizes.rm_zero  # the cached layers are whole on every rank
        whole = read_whole(shape, size, zero, ranks)
        found.append(Memory((parts,), whole + (states if gpu_memory else 0.0)))
    return max(found, key=lambda memory: memory.total)


def of_ppo(sizes: Sizes, gpu_memory: float | None) -> Memory:
    """The trainer with all its models, and vLLM beside it unless it sleeps or is a server."""
    cfg, ranks, size, settings = sizes.cfg.ppo, sizes.ranks, sizes.bytes_per_weight, sizes.cfg.engine_of("ppo")
    parts: Parts = {"process": PROCESS}
    adapters = sizes.actor_trained if cfg.lora else 0
    parts["actor"] = held(sizes.policy.params + adapters, size, sizes.actor_zero, ranks)
    frozen, elsewhere = sizes.frozen_zero, saved_params(sizes)
    if not cfg.lora:
        parts["reference"] = held(sizes.policy.params - elsewhere["reference"], size, frozen, ranks)
    trained = trained_bytes(sizes.actor_trained, settings, ranks, gpu=bool(gpu_memory))
    tokens = ppo_micro(sizes)
    kept = activations(sizes, sizes.policy, sizes.actor_part, tokens, sizes.row(), settings)
    if sizes.critic:
        own = sizes.critic.trunk_params - elsewhere["critic"] + (sizes.critic_trained if cfg.critic_lora else 0)
        parts["critic"] = held(own, size, sizes.actor_zero, ranks)
        of_critic = trained_bytes(sizes.critic_trained, settings, ranks, gpu=bool(gpu_memory))
        trained = {name: value + of_critic[name] for name, value in trained.items()}
        kept = max(kept, activations(sizes, sizes.critic, sizes.critic_part, tokens, sizes.row(), settings))
    members = [sizes.variant_shape(sizes.cfg.rm.variants[name]) for name in cfg.held_members]
    if members:
        own = sum(member.trunk_params for member in members) - elsewhere["proxies"]
        parts["proxies"] = held(own, size, frozen, ranks)
    parts |= trained
    if sizes.shared:
        below = sizes.shared * sizes.policy.layer_params + sizes.policy.embedding_params
        parts["frozen layers"] = held(below - elsewhere["frozen layers"], size, frozen, ranks)
        levels = len({sizes.actor_shared, sizes.critic_shared} - {0})
        parts["states of frozen layers"] = levels * sizes.rollouts * sizes.row() * sizes.policy.hidden * size
    parts["activations"] = kept
    read = cfg.micro_batch * sizes.lengths.response_tokens
    parts["logits"] = logit_bytes(sizes.policy, read, float32=settings.float32_head, backward=True)
    trains = [sizes.policy, *([sizes.critic] if sizes.critic else [])]
    stays = [*members, *([] if cfg.lora else [sizes.policy]), *([sizes.policy] if sizes.shared else [])]
    whole = sum(read_whole(shape, size, sizes.actor_zero, ranks) for shape in trains)
    whole += sum(read_whole(shape, size, frozen, ranks) for shape in stays)
    if cfg.vllm_servers:
        return Memory((parts,), whole)
    vllm = sampler(sizes, gpu_memory)
    if gpu_memory and sizes.cfg.generation.vllm.sleep:
        passing = (*PASSING, "optimiser states") if cfg.offload_while_sampling else PASSING
        return Memory((parts, vllm | {name: n for name, n in parts.items() if name not in passing}), whole)
    return Memory((vllm | parts,), whole)


def memory_of(sizes: Sizes, stage: str, gpu_memory: float | None) -> Memory:
    """What one rank of a stage needs.

    Args:
        gpu_memory: bytes of a GPU; None on CPU.
    """
    if stage in ("prompts", "report"):
        return Memory(({"process": PROCESS / 2},))
    if stage == "rm":
        return of_rm(sizes, gpu_memory)
    if stage == "ppo":
        return of_ppo(sizes, gpu_memory)
    return of_pools(sizes, stage, gpu_memory)
