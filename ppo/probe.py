"""Proof that vLLM runs the actor's weights after a sync, from log-probs of the step's own responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import DataError
from core.generation.local import Generator
from core.generation.remote import ServerGenerator
from core.models.layers import states_at
from core.models.lora import lora_product, merged_lora
from core.training import distributed
from core.training.engine import Engine
from ppo.records import Micro

STALE = 0.25
"""Below this share of its expected value the slope shows that the new weights did not arrive."""
CONCLUSIVE = 0.1
"""Above this standard error, as a share of the expected slope, nothing is concluded."""
ROUNDING = {torch.bfloat16: 0.1, torch.float32: 2e-4}
"""Type of the actor's weights -> root mean square change of its log-probs, in nats, below which nothing is concluded.

So small a change may be the actor's own rounding. The slope is a regression on that change, and errors in the regressor
pull a slope towards 0."""


class SyncProbe:
    """Did the sampler's log-probs change as the actor's did?

    Four log-probs of each token are compared: by the actor before the updates of a step (o) and after them (n), and by
    the sampler before the sync (u) and after it (v). The slope of the regression of v - u on n - o is 1 if the weights
    arrived and 0 if not. It needs no bound on |v - n|, which would have to be far above the effect of a small update,
    and it works however coarse the sampler's arithmetic is, as long as the actor changed by more than its own rounding
    (`ROUNDING`). All log-probs are at temperature 1, at which vLLM gives those of given tokens.

    An adapter that is merged into bfloat16 weights loses what is below half a unit in their last place. The share of
    the step's change that survives (1: all of it) is measured on the weights at each sync. The slope should be at least
    that share. For whole weights that are rounded the share is not known, and nothing is concluded.

    Use it once per step, in the order `sampled`, `before`, (updates and sync), `after`. Every rank must make the same
    calls.

    Compared is one micro-batch of the step's rollout on each rank. Where the temperature of sampling is 1, o and u are
    the log-probs that the rollout has already.

    Args:
        actor: of a `ppo.policy.PolicyModule`.
        dtype: of the sampler's weights.

    Attributes:
        merged: sums of the merged weights of the last sync, one number each: not finite where a weight is not.
    """

    def __init__(self, actor: Engine, generator: Generator | ServerGenerator, *, dtype: torch.dtype):
        self._actor, self._generator, self._dtype = actor, generator, dtype
        self._at_one = actor.module.temperature == 1.0
        self._of_actor = next(actor.module.parameters()).dtype
        self._same_type = self._of_actor == dtype
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._exact = self._kept = 0.0
        self.merged: list[Tensor] = []

    def watch(self, name: str, base: Tensor, a: Tensor, b: Tensor, scaling: float, merged: Tensor) -> None:
        """A `core.training.weights.MergeWatch`: adds up how much of each adapted weight's change is in `merged`."""
        product, before, old = lora_product(a, b, scaling), torch.zeros(()), base
        if name in self._factors:
            before = lora_product(*self._factors[name], scaling)
            old = merged_lora(base, before)
        change = product - before
        survived = merged.to(self._dtype).float() - old.to(self._dtype).float()
        self._exact += float(change.square().sum(dtype=torch.float64))
        self._kept += float((change * survived).sum(dtype=torch.float64))
        self.merged.append(merged.sum(dtype=torch.float32))
        self._factors[name] = (a.detach().clone(), b.detach().clone())

    def sampled(self, micros: Sequence[Micro], *, current: bool) -> None:
        """Choose a micro-batch of this step and keep the sampler's log-probs of it. The sampler must be awake.

        Args:
            current: the sampler still has the weights that these responses come from.
        """
        self._micro = max(micros, key=lambda m: int(m.is_response.sum()))  # more tokens show more
        self._before = self._micro.sampler_logprobs if current and self._at_one else self._sampler_logprobs()

    @torch.no_grad()
    def before(self) -> None:
        """Keep the actor's log-probs; call it before the actor is updated, with the rollout's log-probs filled in."""
        self._exact = self._kept = 0.0
        self.merged = []
        self._old = self._micro.logprobs if self._at_one else self._actor_logprobs()

    @torch.no_grad()
    def after(self, step: int) -> dict[str, float]:
        """Compare, over all ranks; call it after the sync. The sampler must be awake.

        Returns:
            `sync_slope`, its standard error `sync_slope_se` (99 at most) and, where it is known, `sync_survival`: the
            share of the update that the sampler's weights can hold.

        Raises:
            DataError: the sampler still has the old weights.
        """
        mask = self._micro.is_response
        moved = torch.where(mask, self._actor_logprobs() - self._old, 0.0).double()
        seen = torch.where(mask, self._sampler_logprobs() - self._before, 0.0).double()
        count, xx, xy = distributed.global_sum(
            float(mask.sum()), float(moved.square().sum()), float((moved * seen).sum())
        )  # fmt: skip
        slope = xy / xx if xx else 0.0
        # The tokens of a response are not independent, so each response is one observation.
        (square,) = distributed.global_sum(float((moved * (seen - slope * moved)).sum(-1).square().sum()))
        error = square**0.5 / xx if xx else float("inf")
        expected = min(1.0, max(0.0, self._kept / self._exact)) if self._exact else float(self._same_type)
        conclusive = error < CONCLUSIVE * expected and (xx / count) ** 0.5 > ROUNDING[self._of_actor]
        if conclusive and slope < STALE * expected:
            raise DataError(
                f"ppo step {step}: after the weight sync vLLM's log-probs moved {slope:.2f} +- {error:.2f} times as "
                f"far as the actor's ({expected:.2f} would be right): the new weights did not arrive"
            )
        stats = {"sync_slope": slope, "sync_slope_se": min(error, 99.0)}
        return stats | ({"sync_survival": expected} if self._exact or self._same_type else {})

    def _actor_logprobs(self) -> Tensor:
        m = self._micro
        frozen = states_at(m.frozen, self._actor.continues)
        return self._actor(m.input_ids, m.attention_mask, m.is_response, temperature=1.0, frozen=frozen)[0]

    def _sampler_logprobs(self) -> Tensor:
        m = self._micro
        rows = [ids[: int(n)].tolist() for ids, n in zip(m.input_ids, m.attention_mask.sum(-1), strict=True)]
        logps = torch.zeros(m.is_response.shape, device=m.input_ids.device)
        for b, row in enumerate(self._generator.logprobs_of(rows)):
            logps[b, : len(row)] = torch.tensor(row, device=logps.device)
        return logps
