"""Proof that vLLM runs the actor's weights after a sync, by log-probs of the step's own responses."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines import engine
from pipelines.data import DataError
from pipelines.generate import Generator
from ppo.rollout import Micro

STALE = 0.5
"""A slope below this is nearer to the old weights than to the new ones."""
CONCLUSIVE = 0.15
"""Standard error of the slope above which an update was too small to be told from rounding."""


class SyncProbe:
    """Did the sampler move with the actor?

    With log-probs of the same tokens by the actor before the update (o) and after it (n), and by the sampler after the
    sync (v), the slope of v - o on n - o is 1 if the weights arrived and 0 if not, however small the update was and
    however coarse the sampler's arithmetic: unlike a bound on |v - n|, which small updates never reach. All at
    temperature 1, where vLLM gives log-probs of given tokens.
    """

    def __init__(self, actor: engine.Engine, generator: Generator):
        self._actor, self._generator = actor, generator

    @torch.no_grad()
    def before(self, micros: list[Micro]) -> None:
        """Keep the actor's log-probs on the longest micro-batch, before it is updated."""
        self._micro = micros[-1]
        self._old = self._logprobs()

    @torch.no_grad()
    def after(self, step: int) -> dict[str, float]:
        """Slope and its standard error over all ranks; call it between waking and sleeping of the sampler.

        Raises:
            DataError: the sampler still has the old weights.
        """
        m, new = self._micro, self._logprobs()
        rows = [ids[: int(n)].tolist() for ids, n in zip(m.input_ids, m.attention_mask.sum(-1), strict=True)]
        sampler = torch.zeros_like(new)
        for b, found in enumerate(self._generator.logprobs_of(rows)):
            sampler[b, : len(found)] = torch.tensor(found, device=new.device)
        moved, seen = ((x - self._old)[m.is_response].double() for x in (new, sampler))
        count, xx, xy, yy = engine.global_sum(
            len(moved), float(moved @ moved), float(moved @ seen), float(seen @ seen)
        )  # fmt: skip
        slope = xy / xx if xx else 0.0
        error = max(0.0, (yy - slope * xy) / count / xx) ** 0.5 if xx else float("inf")
        if error < CONCLUSIVE and slope < STALE:
            raise DataError(
                f"ppo step {step}: after the weight sync vLLM's log-probs moved {slope:.2f} +- {error:.2f} times as "
                "far as the actor's (1 is right): the new weights did not arrive"
            )
        return {"sync_slope": slope, "sync_slope_se": min(error, 99.0)}

    def _logprobs(self) -> Tensor:
        m = self._micro
        return self._actor(m.input_ids, m.attention_mask, m.is_response, temperature=1.0, lower=m.lower)[0]
