"""What stops a run before it saves anything: numbers that are not finite, and samples that are not the actor's.

Every rank must call each function, and all ranks stop together.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from core.errors import DataError
from core.training.distributed import check_finite
from core.training.engine import Engine
from ppo.records import Micro, Rollout

ADVICE = (
    "Nothing of this step is saved, and what earlier steps have saved is as it was. Lower ppo.actor.lr or "
    "ppo.critic.lr, or set engine.dtype=float32; at step 1, look for broken weights in policy.path and in the proxy"
)
"""What to do about numbers that are not finite."""
WEIGHTS_OF, METRIC = "weights of the", "values of the metric"
"""Beginnings of what is said of weights and of metrics."""
MAX_MISMATCH = 0.2
"""Mean |difference of log-probs| between vLLM and the actor, in nats, above which a run stops.

Rounding to bfloat16 gives 0.03 to 0.05, a mixture of old and new weights 0.3.
"""
OF_ROLLOUT = {
    "sampler_logprobs": "log-probs by vLLM",
    "proxy": "rewards of the proxy",
    "logprobs": "log-probs by the actor",
    "ref_logprobs": "log-probs by the reference",
    "critic_outputs": "values by the critic",
    "is_weight": "importance weights",
}
OF_ADVANTAGES = {"values": "normalised values", "returns": "returns", "advantages": "advantages"}


def check_rollout(step: int, rollout: Rollout) -> None:
    """DataError where what vLLM, the proxy, actor, reference or critic gave is not finite."""
    _check(step, rollout.micros, OF_ROLLOUT)


def check_advantages(step: int, micros: list[Micro]) -> None:
    """DataError where advantages, or the returns that the critic learns, are not finite."""
    _check(step, micros, OF_ADVANTAGES)


def check_weights(step: int, actor: Engine, critic: Engine | None) -> None:
    """DataError where a trained weight is not finite."""
    engines = {f"{WEIGHTS_OF} actor": actor} | ({f"{WEIGHTS_OF} critic": critic} if critic else {})
    check_finite(f"ppo step {step}", {name: engine.trained_values() for name, engine in engines.items()}, ADVICE)


def check_merged(step: int, sums: list[Tensor]) -> None:
    """DataError where a weight is not finite after an adapter was merged into it; `sums` are those of such weights."""
    check_finite(f"ppo step {step}", {f"{WEIGHTS_OF} actor, merged for vLLM": sums}, ADVICE)


def check_metrics(step: int, stats: Mapping[str, float]) -> None:
    """DataError where a metric is not finite: what the other checks may have missed."""
    check_finite(f"ppo step {step}", {f"{METRIC} {name}": [x] for name, x in stats.items()}, ADVICE)


def check_mismatch(step: int, mismatch: float) -> None:
    """DataError where vLLM's log-probs of all samples and the actor's differ by more than rounding does.

    `ppo.probe` compares how both changed in an update, on some of the samples.

    Args:
        mismatch: mean |difference| over the response tokens of all ranks, in nats.
    """
    if mismatch > MAX_MISMATCH:
        raise DataError(
            f"ppo step {step}: log-probs of vLLM and the actor differ by {mismatch:.3f} nats"
            f" (limit {MAX_MISMATCH}): vLLM does not run the actor's weights"
        )


def _check(step: int, micros: list[Micro], names: Mapping[str, str]) -> None:
    # A rollout without a critic, or without importance weights, has no such tensors on any rank.
    present = {text: name for name, text in names.items() if getattr(micros[0], name, None) is not None}
    tensors = {text: [getattr(m, name) for m in micros] for text, name in present.items()}
    check_finite(f"ppo step {step}", tensors, ADVICE, [m.prompt_ids for m in micros])
