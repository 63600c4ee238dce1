"""The policy on held-out prompts, every few steps of PPO: proxy, KL, length, ends, and gold where it is watched.

The prompts are those of the split rm_val: neither the policy nor a reward model is trained on them, and the prompts
that stage `eval` measures on stay untouched. Each step has the same prompts and the same random numbers, so that steps
differ by their policies alone.

Nothing that is measured here reaches the training: gold least of all, and its name says so wherever it is shown.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from core.config import Config, Ppo
from core.data.rows import PromptRow, ResponseRow
from core.data.streams import stream_seed
from core.errors import ArtefactError
from core.generation.local import Generator
from core.generation.remote import ServerGenerator
from core.models.layers import states_at
from core.training import distributed
from ppo.forward import Forward, Wide
from ppo.math import clustered_se
from ppo.models import Engines
from ppo.records import Rollout, Sampled, make_micros
from ppo.reward.mixed import PART, MixedReward
from ppo.rollout import responses, rows_of, statistics
from rm.gold import GoldModel, load_gold, score_samples

FILE = "held_out.jsonl"
UNUSED = "_not_used_for_training"
"""Ends the names of what is measured by gold."""
MEASURED = (
    "proxy_mean", "proxy_se", "kl_nats_per_response", "kl_k3_nats_per_response", "response_tokens", "eos_rate",
)  # fmt: skip
"""Of `ppo.rollout.statistics`."""


class HeldOut:
    """Evaluations of one run. Every rank makes one and calls `evaluate` with the others.

    Args:
        engines: of which actor, reference and the shared frozen layers are run, without gradients.
        reward: what is optimised.
        generator: has the weights of the policy that is evaluated.
        prompts: rows of the split; the first `ppo.eval_prompts` of them are used, as many as divide among the ranks.
        gold: on the first rank, None where it is not watched.
        seed: of the samples.

    Raises:
        ArtefactError: fewer prompts than ranks.
    """

    def __init__(
        self, ppo: Ppo, engines: Engines, reward: MixedReward, generator: Generator | ServerGenerator, *,
        prompts: list[PromptRow], gold: GoldModel | None, seed: int,
    ):  # fmt: skip
        self._ppo, self._engines, self._reward, self._generator, self._gold = ppo, engines, reward, generator, gold
        rank, ranks = distributed.rank(), distributed.world_size()
        count = min(ppo.eval_prompts, len(prompts)) // ranks
        if not count:
            raise ArtefactError(
                f"ppo.eval_every: {len(prompts)} prompts of the split rm_val are too few for {ranks} ranks"
            )
        self._rows = prompts[: count * ranks][rank * count : (rank + 1) * count]
        self._seed = stream_seed(seed, "ppo", "held-out", rank)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Sample and measure the policy after `step`, whose weights vLLM and the actor have; vLLM must be awake.

        Returns:
            Means over the responses of all ranks, by the names of MEASURED and of the parts of the reward; on the first
            rank with gold its mean and standard error.
        """
        generator, engines = self._generator, self._engines
        prompts = [generator.tokenizer.prompt_ids(row["prompt"]) for row in self._rows]
        completions = [c for (c,) in generator.generate(prompts, n=1, seed=self._seed)]
        generator.sleep()
        sampled = Sampled(self._rows, prompts, step, list(range(len(prompts))), completions)
        count = -(-len(prompts) // self._ppo.micro_batch)
        micros = make_micros(prompts, completions, sampled.groups, generator.tokenizer.pad_id, count)
        forward = Forward(micros)
        if engines.frozen_layers:
            forward.fill_frozen(engines.frozen_layers)
        rows = responses(sampled, generator.tokenizer.fingerprint)
        rewards, parts = self._reward.score(rows, forward.batches)
        for micro in micros:
            micro.proxy = rewards.to(micro.rows.device)[micro.rows]
        forward.fill("logprobs", lambda wide: self._logprobs(wide, reference=False))
        forward.fill("ref_logprobs", lambda wide: self._logprobs(wide, reference=True))
        found = statistics(Rollout([micros], rows_of(step, sampled, rewards, parts), policy=step, behind=0))
        kept = {name: value for name, value in found.items() if name in MEASURED or name.startswith(PART)}
        return kept | self._measured_by_gold(rows)

    def _logprobs(self, rows: Wide, *, reference: bool) -> torch.Tensor:
        engine = self._engines.reference if reference else self._engines.actor
        inputs = (rows.input_ids, rows.attention_mask, rows.is_response)
        return engine(*inputs, reference=reference, frozen=states_at(rows.frozen, engine.continues))[0]

    def _measured_by_gold(self, rows: list[ResponseRow]) -> dict[str, float]:
        if not self._ppo.watch_gold:
            return {}
        everyones = distributed.gather_rows(rows)
        if self._gold is None:
            return {}
        scores = np.asarray(score_samples(self._gold, cast(list[ResponseRow], everyones))).tolist()
        names = [row["prompt_id"] for row in everyones]
        return {
            f"gold_mean{UNUSED}": sum(scores) / len(scores),
            f"gold_se{UNUSED}": clustered_se(scores, names),
        }


def watched_gold(cfg: Config) -> GoldModel | None:
    """Gold, on the first rank and where `ppo.watch_gold` asks for it.

    Call it before models are put under engines, which may change how others are loaded.
    """
    return load_gold(cfg.gold) if cfg.ppo.watch_gold and distributed.rank() == 0 else None


def in_words(step: int, stats: dict[str, float]) -> str:
    """An evaluation for the console."""
    text = (
        "ppo {step:>4}: held out: proxy {proxy_mean:+.3f} +- {proxy_se:.3f}  KL {kl_nats_per_response:.2f}  tokens "
        "{response_tokens:.0f}  EOS {eos_rate:.0%}".format(step=step, **stats)
    )
    gold = stats.get(f"gold_mean{UNUSED}")
    return text if gold is None else f"{text}  gold {gold:+.3f} (not used for training)"
