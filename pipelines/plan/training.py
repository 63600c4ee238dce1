"""Counted work of the stages that train on several ranks: rm and ppo. Counts are those of one rank."""

from __future__ import annotations

from core.config import RewardVariant
from pipelines.plan.pools import SCORE_TOKENS, Phases, checkpoints, vllm
from pipelines.plan.sizes import Part, Sizes, batches
from pipelines.plan.work import Gather, Item, Load, Logits, Pass, Read, Sample, Start, Trained, Update, Write
from ppo.forward import WIDER


def rm(sizes: Sizes) -> Phases:
    """Every variant: load, train, measure on the validation pairs, save."""
    phases: Phases = {"start": _libraries(sizes), "train": [], "measure": [], "save": []}
    cfg, ranks = sizes.cfg.rm, sizes.ranks
    filled: dict[int, dict[int, int]] = {}
    """Layers of the backbone -> seed -> epochs whose orders have filled the cache of its states."""
    if cfg.cache_frozen_layers:
        depths = {sizes.variant_shape(variant).layers for variant in cfg.variants.values()}
        phases["start"].append(Load(len(depths), sizes.base.params, ranks))
    for variant in cfg.variants.values():
        shape, part = sizes.variant_shape(variant), sizes.rm_part(variant)
        phases["start"] += [Load(1, shape.params, ranks), Start("engine", ranks=ranks)]
        known = filled.setdefault(shape.layers, {}) if rm_caches(sizes, variant) else {}
        epochs, before = cfg.epochs_of(variant), sum(known.values())
        new_orders = max(epochs - known.get(variant.seed, 0), 0)
        phases["train"] += _training(sizes, variant, part, orders=before, new_orders=new_orders)
        phases["measure"] += _measuring(sizes, variant, first=not known)
        known[variant.seed] = max(epochs, known.get(variant.seed, 0))
        size = sizes.rm_trained(variant) if cfg.save == "adapter" and part.kind == "lora" else shape.params
        phases["save"] += [Gather(shape, 1, sizes.rm_zero, ranks), Write(size * sizes.bytes_per_weight)]
    return phases


def _libraries(sizes: Sizes) -> list[Item]:
    return [Start("tokenizer", ranks=sizes.ranks), Start("deepspeed", ranks=sizes.ranks)]


def rm_steps(sizes: Sizes, variant: RewardVariant) -> int:
    """Optimiser steps of a variant."""
    return sizes.cfg.rm.epochs_of(variant) * (rm_pairs(sizes, variant) // sizes.cfg.rm.global_batch)


def rm_pairs(sizes: Sizes, variant: RewardVariant) -> int:
    return min(variant.pairs or 10**12, sizes.lengths.pairs["rm_train"])


def cached_orders(sizes: Sizes) -> int:
    """In how many orders the variants together see the pairs: each seed has one for each epoch."""
    epochs: dict[int, int] = {}
    for variant in sizes.cfg.rm.variants.values():
        epochs[variant.seed] = max(sizes.cfg.rm.epochs_of(variant), epochs.get(variant.seed, 0))
    return sum(epochs.values())


def rm_caches(sizes: Sizes, variant: RewardVariant) -> bool:
    """Whether the states below the variant's trained layers are kept (`rm.variants.fits_cache`)."""
    rm = sizes.cfg.rm
    if not rm.cache_frozen_layers or rm.trainable_layers is None:
        return False
    own = rm.trainable_layers if variant.trainable_layers is None else variant.trainable_layers
    return own <= rm.trainable_layers < sizes.variant_shape(variant).layers


def _training(sizes: Sizes, variant: RewardVariant, part: Part, *, orders: int, new_orders: int) -> list[Item]:
    """All passes of a variant on one rank.

    Args:
        orders: of the pairs, by which the cache was filled before; each seed has one for each epoch.
        new_orders: how many of the variant's epochs have an order that no variant before it had: a rank then gets pairs
            whose states it does not have yet.
    """
    cfg, ranks, zero, shape = sizes.cfg.rm, sizes.ranks, sizes.rm_zero, sizes.variant_shape(variant)
    steps, passes = rm_steps(sizes, variant), cfg.global_batch // (cfg.micro_batch * ranks)
    calls = steps * passes
    of_epoch = calls / cfg.epochs_of(variant)
    tokens, length = sizes.pair_batch(cfg.global_batch, ranks * passes), sizes.pair_length
    items: list[Item] = []
    if rm_caches(sizes, variant):
        assert cfg.trainable_layers is not None
        depth = shape.layers - cfg.trainable_layers
        for k in range(orders, orders + new_orders):
            lacks = (1 - 1 / ranks) ** k  # the pairs that the rank did not get in one of the orders before
            if not lacks:  # a single rank has seen all of them
                break
            some = 1 - (1 - lacks) ** cfg.micro_batch  # of the micro-batches lack a pair
            items.append(Pass(shape, of_epoch * some, tokens * lacks / some, length, depth, ranks=ranks))
        between = part.frozen - depth
    else:
        between = part.frozen
    if between:
        items.append(Pass(shape, calls, tokens, length, between, zero=zero, ranks=ranks))
    items.append(Pass(shape, calls, tokens, length, part.trained, part.kind, zero, ranks))
    if variant.regularises:
        sides = 1 if variant.text_regulariser.startswith("sft") else 2
        read = cfg.micro_batch * sides * sizes.lengths.pair_tokens[1]
        head_trained = sizes.rm_trained(variant) == shape.params
        items.append(Logits(shape, calls, read, True, head_trained, zero, ranks))
        if variant.text_regulariser == "dpo":
            items += [
                Pass(shape, of_epoch, tokens, length, shape.layers, zero=zero, ranks=ranks),
                Logits(shape, of_epoch, read, zero=zero, ranks=ranks),
            ]
    if variant.head == "odin":
        items.append(Pass(shape, calls, tokens, length, part.trained, zero=zero, ranks=ranks))
    items.append(Update(steps, sizes.rm_trained(variant), zero, ranks))
    return items


def _measuring(sizes: Sizes, variant: RewardVariant, *, first: bool) -> list[Item]:
    """The validation pairs and the calibration samples, scored by all ranks together."""
    shape, lengths = sizes.variant_shape(variant), sizes.lengths
    total = lengths.pairs["rm_val"] * sizes.pair_row + lengths.calibration * sizes.row(2)
    calls, tokens = batches(total, SCORE_TOKENS, sizes.ranks)
    depth = shape.layers - (sizes.cfg.rm.trainable_layers or 0) if rm_caches(sizes, variant) else 0
    items: list[Item] = []
    if depth and first:
        items.append(Pass(shape, calls, tokens, sizes.pair_length, depth, ranks=sizes.ranks))
    rest = Pass(shape, calls, tokens, sizes.pair_length, shape.layers - depth, zero=sizes.rm_zero, ranks=sizes.ranks)
    return [*items, rest]


def ppo(sizes: Sizes) -> Phases:
    """The models, then the phases of all steps by the names that metrics.jsonl has for their seconds."""
    cfg, ranks = sizes.cfg.ppo, sizes.ranks
    steps = cfg.steps
    phases: Phases = {
        "start": _starting(sizes),
        "generate": [_sampling(sizes, steps)] if not cfg.vllm_servers else [],
        "score": _scoring(sizes, steps),
        "logprobs": _reading(sizes, steps),
        "train": _updating(sizes, steps),
        "sync": [Gather(sizes.policy, steps, sizes.actor_zero, ranks, to_vllm=True)],
        "probe": [],
        "save": [],
    }
    # At temperature 1 the log-probs of the rollout serve the probe too.
    again = sizes.cfg.generation.temperature != 1
    read = Read(sizes.policy, steps, cfg.micro_batch * sizes.row(), ranks)
    phases["generate"] += [read] if again else []
    phases["probe"] += [*_actor(sizes, steps * (1 + again), ppo_micro(sizes), reference=False), read]
    size = sizes.bytes_per_weight
    policy = sizes.actor_trained * size
    states = len(range(cfg.save_every, steps, cfg.save_every)) + cfg.keep_state
    phases["save"] += [
        Write(checkpoints(sizes) * policy), Write(states * state_bytes(sizes)),
        Gather(sizes.policy, 1, sizes.actor_zero, ranks), Write(sizes.policy.params * size),
    ]  # fmt: skip
    return phases


def state_bytes(sizes: Sizes) -> float:
    """A state to resume from, of all ranks: optimiser states of what is trained, and the weights of actor and critic,
    at stage 3 only the frozen ones, since the master weights are those of the others."""
    cfg, zero, half = sizes.cfg.ppo, sizes.actor_zero, sizes.bytes_per_weight == 2
    trained = sizes.actor_trained + (sizes.critic_trained if sizes.critic else 0)
    weights = sizes.policy.params + (sizes.actor_trained if cfg.lora else 0)
    if sizes.critic:
        weights += sizes.critic.trunk_params + (sizes.critic_trained if cfg.critic_lora else 0)
    states = 12 if half or zero else 8
    return states * trained + (weights - (trained if zero == 3 else 0)) * sizes.bytes_per_weight


def _starting(sizes: Sizes) -> list[Item]:
    cfg, ranks, policy = sizes.cfg.ppo, sizes.ranks, sizes.policy
    loaded = cfg.held_members or ((cfg.proxy,) if cfg.reward_server else ())
    members = [sizes.variant_shape(sizes.cfg.rm.variants[name]) for name in loaded]
    items = _libraries(sizes)
    if not cfg.vllm_servers:
        items.append(vllm(sizes))
    models = [policy, *([sizes.critic] if sizes.critic else []), *members]
    models += [policy] if sizes.shared else []
    models += [] if cfg.lora else [policy]
    items += [Load(1, shape.params, ranks) for shape in models]
    return [*items, Start("engine", len(models), ranks)]


def _sampling(sizes: Sizes, calls: float) -> Sample:
    cfg, generation = sizes.cfg.ppo, sizes.cfg.generation
    return Sample(
        sizes.policy, calls, sizes.rollouts, sizes.rollouts / cfg.samples_per_prompt, sizes.lengths.prompt_tokens,
        sizes.lengths.response_tokens, generation.max_new_tokens, generation.vllm.max_num_seqs,
        generation.vllm.block_size or 128, sizes.ranks, not generation.vllm.enforce_eager,
    )  # fmt: skip


def _scoring(sizes: Sizes, steps: float) -> list[Item]:
    """The proxies on the responses of all ranks, in batches that the ranks divide among themselves; or on this rank's,
    from the states of the shared layers, where a proxy has these layers too."""
    cfg, n = sizes.cfg.ppo, sizes.cfg.ppo.samples_per_prompt
    items: list[Item] = []
    for variant in (sizes.cfg.rm.variants[name] for name in cfg.held_members):
        shape, zero = sizes.variant_shape(variant), sizes.frozen_zero
        if depth := sizes.member_shared(variant):
            calls, tokens = _wide(sizes)
            layers = shape.layers - depth
            items.append(Pass(shape, steps * calls, tokens, sizes.row(), layers, zero=zero, ranks=sizes.ranks))
        else:
            calls, tokens = batches(cfg.rollouts / n * sizes.row(n), SCORE_TOKENS, sizes.ranks)
            items.append(Pass(shape, steps * calls, tokens, sizes.row(n), shape.layers, zero=zero, ranks=sizes.ranks))
    return items


def _wide(sizes: Sizes) -> tuple[float, float]:
    """(passes, tokens of a pass) without gradients over a rank's rollout (`ppo.forward`)."""
    micros = sizes.rollouts // sizes.cfg.ppo.micro_batch
    calls = max(1, micros // WIDER["cpu" if sizes.gpu_memory is None else "cuda"])
    return float(calls), sizes.padded(sizes.rollouts, calls)


def _reading(sizes: Sizes, steps: float) -> list[Item]:
    """Frozen layers, log-probs of actor and reference, values of the critic, for one rank's rollout."""
    micros, (calls, tokens) = sizes.rollouts // sizes.cfg.ppo.micro_batch, _wide(sizes)
    items: list[Item] = []
    if sizes.shared:
        zero = sizes.frozen_zero
        items.append(Pass(sizes.policy, steps * calls, tokens, sizes.row(), sizes.shared, zero=zero, ranks=sizes.ranks))
    items += _actor(sizes, steps * micros, ppo_micro(sizes), reference=False)
    items += _actor(sizes, steps * calls, tokens, reference=True)
    if sizes.critic:
        items += _trunk(sizes, steps * calls, tokens, "critic", None)
    return items


def _updating(sizes: Sizes, steps: float) -> list[Item]:
    cfg, zero, ranks = sizes.cfg.ppo, sizes.actor_zero, sizes.ranks
    calls = steps * cfg.epochs * sizes.rollouts / cfg.micro_batch
    updates = steps * cfg.epochs * cfg.minibatches
    policy = (steps - cfg.critic_warmup_steps) / steps  # the actor rests in the critic's first steps
    part = sizes.actor_part
    items = _trunk(sizes, calls * policy, ppo_micro(sizes), "actor", part.kind)
    head = sizes.cfg.ppo.lora is None
    items.append(Logits(sizes.policy, calls * policy, _responses(sizes), True, head, zero, ranks))
    items.append(Update(updates * policy, sizes.actor_trained, zero, ranks))
    if sizes.critic:
        items += _trunk(sizes, calls, ppo_micro(sizes), "critic", sizes.critic_part.kind)
        items.append(Update(updates, sizes.critic_trained, zero, ranks))
    return items


def _responses(sizes: Sizes) -> float:
    """Response tokens of a micro-batch."""
    return sizes.cfg.ppo.micro_batch * sizes.lengths.response_tokens


def ppo_micro(sizes: Sizes) -> float:
    """Padded tokens of a micro-batch."""
    cfg = sizes.cfg.ppo
    rows = max(1, sizes.rollouts // cfg.minibatches)
    return sizes.padded(rows, max(1, rows // cfg.micro_batch))


def _actor(sizes: Sizes, calls: float, tokens: float, *, reference: bool) -> list[Item]:
    """A forward pass of actor or reference above the shared layers, with log-probs of the responses."""
    zero = sizes.frozen_zero if reference and sizes.cfg.ppo.lora is None else sizes.actor_zero
    layers = sizes.policy.layers - sizes.actor_shared
    responses = tokens * sizes.lengths.response_tokens / sizes.row()
    return [
        Pass(sizes.policy, calls, tokens, sizes.row(), layers, zero=zero, ranks=sizes.ranks),
        Logits(sizes.policy, calls, responses, zero=zero, ranks=sizes.ranks),
    ]


def _trunk(sizes: Sizes, calls: float, tokens: float, which: str, trained: Trained | None) -> list[Item]:
    """The layers of actor or critic above the shared ones; `trained` is what is trained, None a forward pass."""
    if which == "actor":
        shape, part, shared = sizes.policy, sizes.actor_part, sizes.actor_shared
    else:
        assert sizes.critic is not None
        shape, part, shared = sizes.critic, sizes.critic_part, sizes.critic_shared
    make = lambda layers, kind: Pass(  # noqa: E731
        shape, calls, tokens, sizes.row(), layers, kind, sizes.actor_zero, sizes.ranks
    )
    if trained is None:
        return [make(shape.layers - shared, None)]
    between = part.frozen - shared
    return [*([make(between, None)] if between > 0 else []), make(part.trained, trained)]
