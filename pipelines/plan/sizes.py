"""What the counts of all stages start from: sizes of the models, lengths, ranks, and how rows are padded."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import mean

from core.batching import balanced
from core.config import Config, RewardVariant
from pipelines.plan.engines import frozen_zero
from pipelines.plan.lengths import Lengths
from pipelines.plan.shapes import Shape
from pipelines.plan.work import Trained
from rm.variants import num_layers

DRAWS = 50
"""Batches that are drawn to see how many tokens are padding."""


@dataclass(frozen=True, slots=True)
class Part:
    """Layers of a model by what a training pass does with them, from the lowest on."""

    frozen: int
    """Run without gradients."""
    trained: int
    """From the lowest one that is trained on: gradients pass through all of these."""
    kind: Trained


@dataclass(frozen=True)
class Sizes:
    cfg: Config
    lengths: Lengths
    policy: Shape
    base: Shape
    gold: Shape | None
    """None for the built-in judge, which has a rate of its own."""
    ranks: int
    """Of the stage that is counted."""
    gpu_memory: float | None = None
    """Bytes of a GPU; None on CPU, where passes leave padding out (`core.models.unpadded`)."""

    @property
    def bytes_per_weight(self) -> int:
        return 2 if self.cfg.engine.dtype == "bfloat16" else 4

    @property
    def bytes_per_sampler_weight(self) -> int:
        return 4 if self.cfg.generation.vllm.dtype == "float32" else 2

    @property
    def rm_zero(self) -> int:
        return self.cfg.engine_of("rm").zero_stage

    @property
    def actor_zero(self) -> int:
        return self.cfg.engine_of("ppo").zero_stage

    @property
    def frozen_zero(self) -> int | None:
        """Of the models of stage ppo that are not trained: 3 or None for whole ones."""
        ppo = self.cfg.ppo
        shapes = [self.variant_shape(self.cfg.rm.variants[name]) for name in ppo.held_members]
        together = sum(shape.trunk_params for shape in shapes)
        together += self.policy.params * ((not ppo.lora) + (self.shared > 0))
        stage = frozen_zero(self.cfg.engine_of("ppo"), together * self.bytes_per_weight, self.gpu_memory)
        return 3 if stage == 3 else None

    def variant_shape(self, variant: RewardVariant) -> Shape:
        return self.base.cut(num_layers(self.cfg.rm, variant))

    def rm_part(self, variant: RewardVariant) -> Part:
        """What a variant trains of its backbone (`rm.variants.build`)."""
        rm, layers = self.cfg.rm, self.variant_shape(variant).layers
        if rm.lora and variant.trainable_layers is None:
            top = min(rm.lora.top_layers or layers, layers)
            return Part(layers - top, top, "lora")
        count = rm.trainable_layers if variant.trainable_layers is None else variant.trainable_layers
        count = layers if count is None else min(count, layers)
        return Part(layers - count, count, "weights")

    def rm_trained(self, variant: RewardVariant) -> int:
        """Parameters that a variant trains; its head is left out."""
        shape, part = self.variant_shape(variant), self.rm_part(variant)
        if part.kind == "lora":
            assert self.cfg.rm.lora is not None
            return shape.lora_params(self.cfg.rm.lora)
        whole = part.frozen == 0 and self.cfg.rm.trainable_layers is None and variant.trainable_layers is None
        return self.rm_params(variant) if whole else part.trained * shape.layer_params

    def rm_params(self, variant: RewardVariant) -> int:
        """Parameters that stage `rm` holds of a variant, its head and adapters left out."""
        shape = self.variant_shape(variant)
        return shape.params if variant.regularises else shape.trunk_params

    @property
    def actor_part(self) -> Part:
        lora, layers = self.cfg.ppo.lora, self.policy.layers
        if lora is None:
            return Part(0, layers, "weights")
        top = min(lora.top_layers or layers, layers)
        return Part(layers - top, top, "lora")

    @property
    def actor_trained(self) -> int:
        lora = self.cfg.ppo.lora
        return self.policy.params if lora is None else self.policy.lora_params(lora)

    @property
    def critic(self) -> Shape | None:
        """None for estimators without one."""
        ppo = self.cfg.ppo
        if ppo.estimator != "gae":
            return None
        return self.policy if ppo.critic_init == "policy" else self.variant_shape(self.cfg.rm.variants[ppo.proxy])

    @property
    def critic_part(self) -> Part:
        assert self.critic is not None
        layers, lora = self.critic.layers, self.cfg.ppo.critic_lora
        if lora:
            top = min(lora.top_layers or layers, layers)
            return Part(layers - top, top, "lora")
        count = min(self.cfg.ppo.critic_trainable_layers or layers, layers)
        return Part(layers - count, count, "weights")

    @property
    def critic_trained(self) -> int:
        assert self.critic is not None
        part = self.critic_part
        if self.cfg.ppo.critic_lora:
            return self.critic.lora_params(self.cfg.ppo.critic_lora)
        return part.trained * self.critic.layer_params if part.frozen else self.critic.trunk_params

    @property
    def actor_shared(self) -> int:
        """The lowest layers that stage `ppo` runs once, with the reference, before the actor continues; 0 for none."""
        return self.actor_part.frozen if self.cfg.ppo.reuse_frozen_layers else 0

    @property
    def critic_shared(self) -> int:
        """The lowest layers of the critic that are the policy's and run once with them; 0 for none."""
        ppo = self.cfg.ppo
        if self.critic is None or not ppo.reuse_frozen_layers:
            return 0
        if ppo.critic_init == "policy":
            return self.critic_part.frozen
        if self.base.name != self.policy.name:
            return 0
        return min(self.critic_part.frozen, self.untouched(self.cfg.rm.variants[ppo.proxy]))

    @property
    def shared(self) -> int:
        """The lowest layers of the policy that stage `ppo` runs once; 0 for none."""
        return max(self.actor_shared, self.critic_shared)

    def member_shared(self, variant: RewardVariant) -> int:
        """The lowest layers that a reward model of the proxy takes from those; 0 for none."""
        has = self.untouched(variant) if self.base.name == self.policy.name else 0
        return max((depth for depth in (self.actor_shared, self.critic_shared) if depth <= has), default=0)

    def untouched(self, variant: RewardVariant) -> int:
        """The lowest layers of a trained reward model that still are those of its base."""
        return self.rm_part(variant).frozen

    def draw(self, count: int, *, responses: int, seed: int) -> list[int]:
        """Tokens of `count` rows of a prompt and so many responses, drawn from the lengths that are known."""
        rng = random.Random(seed)
        prompt, response = self.lengths.prompt_draws, self.lengths.response_draws
        return [rng.choice(prompt) + sum(rng.choice(response) for _ in range(responses)) for _ in range(count)]

    def padded(self, rows: int, parts: int, *, responses: int = 1) -> float:
        """Mean tokens of one of `parts` micro-batches into which `rows` rows are balanced, padding included where it is
        computed. More parts than rows, of which a plan warns, have a row each."""
        rows = max(rows, parts)
        if self.gpu_memory is None:
            prompt, response = self.lengths.prompt_tokens, self.lengths.response_tokens
            return rows / parts * (prompt + responses * response)
        sizes = []
        for seed in range(DRAWS):
            lengths = self.draw(rows, responses=responses, seed=seed)
            sizes += [len(group) * max(lengths[i] for i in group) for group in balanced(lengths, parts)]
        return mean(sizes)

    @property
    def rollouts(self) -> int:
        """Responses of one rank in a step of PPO."""
        return max(1, self.cfg.ppo.rollouts // self.ranks)

    @property
    def pair_row(self) -> float:
        """Mean tokens of a row that holds a prompt and both responses of a pair."""
        prompt, response = self.lengths.pair_tokens
        return prompt + 2 * response

    @property
    def pair_length(self) -> float:
        """What attends to each other in such a row: on CPU each response with the prompt, else the whole row."""
        return self.pair_row if self.gpu_memory else sum(self.lengths.pair_tokens)

    def pair_batch(self, pairs: int, parts: int) -> float:
        """Mean padded tokens of one of `parts` micro-batches of so many pairs."""
        if self.cfg.preferences.sources:
            return pairs / parts * self.pair_row
        return self.padded(pairs, parts, responses=2)

    def row(self, responses: float = 1) -> float:
        """Mean tokens of a prompt and so many responses."""
        return self.lengths.prompt_tokens + responses * self.lengths.response_tokens


def batches(total: float, budget: float, ranks: int = 1) -> tuple[float, float]:
    """(calls of one rank, tokens of a call) for `total` tokens in batches of at most `budget`, equally many on every
    rank (`core.batching.evenly_on_ranks`)."""
    count = max(1, -(-total // budget))
    count += -count % ranks
    return float(count // ranks), total / count
