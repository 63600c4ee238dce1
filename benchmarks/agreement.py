"""Whether both sides of a row did the same: their losses, rewards, tokens and estimates compared.

The tolerances are those of the number type. bfloat16 has 8 bits, so two orders of the same sums part in the third
digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from statistics import fmean, pstdev
from typing import Any

from benchmarks.records import Agreement, agrees


def training_losses(ours: dict, theirs: dict) -> list[Agreement]:
    """Losses of the same batches, from the same head: the first before any update, the mean over all steps after."""
    a, b = ours["losses"], theirs["losses"]
    n = min(len(a), len(b))
    first, mean = abs(a[0] - b[0]), abs(fmean(a[:n]) - fmean(b[:n]))
    return [
        agrees("loss of the first batch", first < 0.03, f"{a[0]:.4f} and {b[0]:.4f}"),
        agrees(f"mean loss of {n} steps", mean < 0.05, f"{fmean(a[:n]):.4f} and {fmean(b[:n]):.4f}"),
    ]


def finite_losses(ours: dict, theirs: dict) -> list[Agreement]:
    """Of two losses of ours, which differ on purpose."""
    n = min(len(ours["losses"]), len(theirs["losses"]))
    detail = f"{fmean(ours['losses'][:n]):.4f} and {fmean(theirs['losses'][:n]):.4f}"
    ok = all(abs(loss) < 100 for loss in [*ours["losses"], *theirs["losses"]])
    return [agrees(f"losses of {n} steps are finite (GRM's and BT's differ)", ok, detail)]


def rewards(ours: dict, theirs: dict) -> list[Agreement]:
    """Of the same conversations from the same weights."""
    a, b = ours["rewards"], theirs["rewards"]
    spread = pstdev(b)
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    detail = f"mean difference {fmean(apart) / spread:.3f}, largest {max(apart) / spread:.3f} standard deviations"
    return [agrees(f"{len(a)} rewards", fmean(apart) < 0.05 * spread and max(apart) < 0.5 * spread, detail)]


def greedy_tokens(ours: dict, theirs: dict) -> list[Agreement]:
    """The most probable next tokens of the same prompts. After one near-tie the rest of a text differs."""
    pairs = list(zip(ours["greedy"], theirs["greedy"], strict=True))
    first = fmean(a[0] == b[0] for a, b in pairs)
    shared = sum(len(commonprefix([list(a), list(b)])) for a, b in pairs)
    tokens = sum(len(a) for a, _ in pairs)
    detail = f"{first:.0%} of the first tokens; {shared} of {tokens} tokens before the texts part"
    return [agrees("greedy tokens", first >= 0.75 and shared >= tokens / 2, detail)]


def ppo_training(ours: dict, theirs: dict) -> list[Agreement]:
    """Trained parameters, and the reward of the first rollout, which both sample from the untrained policy."""
    a, b = ours["trained"], theirs["trained"]
    numbers = lambda trained: f"{trained['actor']:,} of the policy and {trained['critic']:,} of the critic"  # noqa: E731
    apart, limit = abs(ours["reward"] - theirs["reward"]), 5 * ours["reward_se"]
    detail = f"{ours['reward']:.3f} and {theirs['reward']:.3f}, standard error {ours['reward_se']:.3f}"
    return [
        agrees("trained parameters", a == b, f"{numbers(a)}; {numbers(b)}"),
        agrees("mean reward of the first rollout", apart < limit, detail),
    ]


def best_of_n(ours: dict, theirs: dict) -> list[Agreement]:
    """Mean gold of the best of n: ours over all subsets, theirs of one. At n = N there is one subset only."""
    errors: Sequence[Any] = theirs["standard_error"]
    apart = [abs(a - b) for a, b in zip(ours["mean"], theirs["mean"], strict=True)]
    most = max(d / e for d, e in zip(apart, errors, strict=True))
    return [
        agrees(
            "gold of the best of all samples", apart[-1] < 1e-9, f"{ours['mean'][-1]:.6f} and {theirs['mean'][-1]:.6f}"
        ),
        agrees(f"gold at {len(apart)} values of n", most < 4, f"at most {most:.1f} standard errors apart"),
    ]
