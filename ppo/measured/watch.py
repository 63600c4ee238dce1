"""Warnings of the usual ways in which a PPO run goes wrong, given when they begin, each with what to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Rows = Sequence[Mapping[str, float]]
WINDOW = 3
"""Over how many steps a trend is judged."""


def warnings_of(rows: Rows) -> list[str]:
    """The warnings that begin with the last row.

    Args:
        rows: of metrics.jsonl, from step 1 on.
    """
    now = _warnings_at(rows)
    before = _warnings_at(rows[:-1]) if len(rows) > 1 else {}
    return [text for name, text in now.items() if name not in before]


def _warnings_at(rows: Rows) -> dict[str, str]:
    """Name -> text of the warnings that hold at the last row."""
    return {name: text for name, (holds, text) in CHECKS.items() if rows and holds(rows)}


def _last(key: str, default: float = 0.0) -> Callable[[Rows], float]:
    return lambda rows: rows[-1].get(key, default)


def _all(rows: Rows, test: Callable[[Mapping[str, float]], bool]) -> bool:
    return len(rows) >= WINDOW and all(test(row) for row in rows[-WINDOW:])


def _mean(rows: Rows, key: str) -> float:
    return sum(row.get(key, 0.0) for row in rows) / len(rows)


def _as_stale(rows: Rows) -> int:
    """The index of the first row whose rollout was as far off-policy as that of the last one, but at least 1.

    With ppo.overlap the sampler is some updates behind the actor, and not yet at first.
    """
    last = rows[-1].get("staleness_max", 0.0)
    return max(1, next(i for i, row in enumerate(rows) if row.get("staleness_max", 0.0) >= last))


CHECKS: dict[str, tuple[Callable[[Rows], bool], str]] = {
    "kl negative": (
        lambda rows: _last("kl_nats_per_response")(rows) < -0.5,
        "KL is clearly negative, so the samples are not from the policy whose log-probs are read: check temperature "
        "and stop tokens",
    ),
    "kl exploding": (
        lambda rows: len(rows) > WINDOW
        and _last("kl_nats_per_response")(rows) > 10
        and _last("kl_nats_per_response")(rows) > 2 * rows[-1 - WINDOW].get("kl_nats_per_response", 0.0),
        f"KL has doubled within {WINDOW} steps: raise ppo.kl.coef, set ppo.kl.target, or lower ppo.actor.lr",
    ),
    "clipfrac": (
        lambda rows: _all(rows, lambda r: r.get("clipfrac", 0.0) > 0.3),
        "more than 30% of the tokens are clipped: lower ppo.actor.lr, ppo.epochs or ppo.minibatches",
    ),
    "approx kl": (
        lambda rows: _last("approx_kl")(rows) > 0.1,
        "one step moved the policy by more than 0.1 nats a token: lower ppo.actor.lr or set ppo.kl.stop=0.02",
    ),
    "critic": (
        lambda rows: _all(rows, lambda r: r.get("explained_variance", 1.0) < -0.2),
        "the critic explains less than a constant would, and its bias drives the policy: set "
        "ppo.critic_warmup_steps, ppo.critic_head=zero or ppo.lam=1",
    ),
    "value loss": (
        lambda rows: len(rows) >= 2 * WINDOW
        and _mean(rows[-WINDOW:], "value_loss") > 3 * _mean(rows[-2 * WINDOW : -WINDOW], "value_loss") > 0,
        "the value loss has tripled: lower ppo.critic.lr",
    ),
    "eos": (
        lambda rows: rows[0].get("eos_rate", 1.0) > 0.1
        and _last("eos_rate", 1.0)(rows) < 0.5 * rows[0].get("eos_rate", 1.0),
        "less than half as many responses as at first end by themselves: set ppo.reward.missing_eos_penalty or raise "
        "generation.max_new_tokens",
    ),
    "length": (
        lambda rows: _last("response_tokens")(rows) > 1.5 * rows[0].get("response_tokens", 1.0),
        "responses are 1.5 times as long as at first: if the reward follows length, set ppo.reward.length_penalty",
    ),
    "mismatch": (
        lambda rows: len(rows) > WINDOW
        and _last("mismatch_mean_abs")(rows)
        > 2 * max(r.get("mismatch_mean_abs", 1.0) for r in rows[: _as_stale(rows) + 1]) + 0.01,
        "vLLM's and the actor's log-probs differ twice as much as at first: set generation.vllm.dtype=float32 to see "
        "whether that is rounding",
    ),
    "merging": (
        lambda rows: _all(rows, lambda r: max(r.get("sync_survival", 1.0), r.get("sync_slope", 1.0)) < 0.5),
        "less than half of each update survives merging into the sampler's weights, so vLLM samples from an older "
        "policy: raise ppo.actor.lr, or set generation.vllm.dtype=float32 and engine.dtype=float32",
    ),
    "reward variance": (
        lambda rows: _last("proxy_se", 1.0)(rows) < 0.2 * rows[0].get("proxy_se", 1.0),
        "all responses get nearly the same reward, so the policy has collapsed: see `grm samples`, raise ppo.kl.coef",
    ),
    "proxy falling": (
        lambda rows: len(rows) >= 2 * WINDOW
        and _mean(rows[-WINDOW:], "proxy_mean")
        < _mean(rows[:WINDOW], "proxy_mean") - 3 * 2**0.5 * _mean(rows, "proxy_se") / WINDOW**0.5,
        "the proxy reward is falling, so PPO is not optimising it: look at the critic's explained_variance, lower "
        "ppo.actor.lr, or raise ppo.rollouts",
    ),
}  # fmt: skip
"""Name -> (does it hold at the last of these rows, what it means and what to try)."""
