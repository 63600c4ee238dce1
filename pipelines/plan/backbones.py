"""Which frozen weights the models of stage `ppo` have in memory once (`core.models.shared_weights`)."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.plan.shapes import Shape
from pipelines.plan.sizes import Sizes

Block = tuple[str, int]
"""Whose weights, and which layer; OUTSIDE is what is outside the layers."""
OUTSIDE = -1


def saved_params(sizes: Sizes) -> dict[str, int]:
    """Parameters that critic, proxies, reference and frozen layers need not hold, since an earlier model has them."""
    cfg, settings = sizes.cfg.ppo, sizes.cfg.engine_of("ppo")
    of_trained, of_frozen = settings.shares_trained, settings.shares_frozen
    there: set[Block] = set()
    saved = dict.fromkeys(("critic", "proxies", "reference", "frozen layers"), 0)

    def take(name: str, shape: Shape, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if block in there:
                saved[name] += shape.embedding_params if block[1] == OUTSIDE else shape.layer_params
        there.update(blocks)

    policy = [("policy", i) for i in range(OUTSIDE, sizes.policy.layers)]
    if of_trained and cfg.lora:
        there.update(policy)
    if of_trained and sizes.critic:
        part = sizes.critic_part
        frozen = sizes.critic.layers if part.kind == "lora" else part.frozen
        start = cfg.proxy if cfg.critic_init == "proxy" else None
        take("critic", sizes.critic, _blocks(sizes, start, frozen))
    if of_frozen:
        for name in cfg.held_members:
            shape = sizes.variant_shape(sizes.cfg.rm.variants[name])
            take("proxies", shape, _blocks(sizes, name, shape.layers))
        if sizes.shared:
            take("frozen layers", sizes.policy, policy[: sizes.shared + 1])
        if not cfg.lora:
            take("reference", sizes.policy, policy)
    return saved


def _blocks(sizes: Sizes, variant: str | None, layers: int) -> list[Block]:
    """The lowest layers of a model and what is outside them, if it has any of them frozen; None is the policy."""
    if not layers:
        return []
    if variant is None:
        return [("policy", i) for i in range(OUTSIDE, layers)]
    untouched = sizes.untouched(sizes.cfg.rm.variants[variant])
    base = "policy" if sizes.base.name == sizes.policy.name else "base"
    return [(base if untouched and i < untouched else variant, i) for i in range(OUTSIDE, layers)]
