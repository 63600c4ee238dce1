"""Metrics of a reward model on comparisons: pure functions of rewards, lengths and labels, in float64.

n comparisons; u units, which accuracy is the mean over: a comparison, or in RewardBench 2 an item of several responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from rm.evaluation.intervals import Array, clusters_of, mean_difference, mean_with_intervals

Ties = Literal["half", "drop", "wrong"]
TIE_CREDIT: dict[str, float] = {"half": 0.5, "drop": math.nan, "wrong": 0.0}
ECE_BINS = 10
TEMPERATURE_RANGE = 1e3
"""Temperatures are searched within this factor of the root mean square of the reward differences."""


def pair_accuracy(preferred: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n]: 1 if the preferred response has the higher reward, 0 if the lower one, 1/2 for a tie."""
    return (preferred > other) + 0.5 * (preferred == other)


class ComparisonRow(TypedDict):
    """A row of `grm rm-eval --out`: two conversations of an evaluation set and their rewards."""

    id: str
    """Unique within its set."""
    subset: str
    item: str
    """The item of the benchmark that it belongs to."""
    prompt_id: str
    """Comparisons that share it are not independent."""
    chosen_index: int
    """Which chosen response of the item; in RM-Bench its style."""
    rejected_index: int
    label_tie: bool
    """Whether the label says that neither response is better."""
    reward_chosen: float
    """Raw."""
    reward_rejected: float
    chosen_words: int
    """Words of the chosen response."""
    rejected_words: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Columns of a table of scored comparisons, all [n]."""

    item: list[str]
    subset: list[str]
    prompt: list[str]
    chosen_index: NDArray[np.int64]
    rejected_index: NDArray[np.int64]
    label_tie: NDArray[np.bool_]
    chosen: Array
    rejected: Array
    chosen_words: Array
    rejected_words: Array

    @classmethod
    def of(cls, rows: Sequence[ComparisonRow]) -> Scored:
        """The columns of the rows."""
        table: Sequence[Mapping[str, Any]] = rows
        column = lambda name, kind: np.array([row[name] for row in table], dtype=kind)  # noqa: E731
        return cls(
            [row["item"] for row in rows], [row["subset"] for row in rows], [row["prompt_id"] for row in rows],
            column("chosen_index", np.int64), column("rejected_index", np.int64), column("label_tie", np.bool_),
            column("reward_chosen", np.float64), column("reward_rejected", np.float64),
            column("chosen_words", np.float64), column("rejected_words", np.float64),
        )  # fmt: skip

    def responses(self) -> tuple[Array, Array]:
        """Rewards and words of the responses, [2n] or fewer: a response in several comparisons counts once."""
        responses = {}
        for i, item in enumerate(self.item):
            responses[item, "chosen", self.chosen_index[i]] = self.chosen[i], self.chosen_words[i]
            responses[item, "rejected", self.rejected_index[i]] = self.rejected[i], self.rejected_words[i]
        rewards, words = np.array(list(responses.values())).T
        return rewards, words


@dataclass(frozen=True, slots=True)
class Units:
    """What accuracy is the mean over."""

    names: list[str]
    subset: list[str]
    prompt: list[str]
    hits: Array
    """[u], each in [0, 1]; NaN for a dropped tie."""


def pair_hits(chosen: Array, rejected: Array, ties: Ties = "half") -> Array:
    """[n]: 1 or 0; for equal values 1/2 (half), NaN (drop) or 0 (wrong)."""
    return np.where(chosen == rejected, TIE_CREDIT[ties], (chosen > rejected).astype(np.float64))


def units(scored: Scored, layout: str, ties: Ties = "half", *, by_words: bool = False) -> Units:
    """Units of a set and their hits; `by_words` prefers the longer response instead of the higher reward.

    In the layout `rewardbench2` an item is a hit if each of its chosen responses beats each rejected one (all subsets
    but Ties have one chosen response). If k rejected ones tie with the worst chosen one at the top, the item counts
    1 / (1 + k) with `half`, as in the authors' code. In other layouts each comparison is a unit. Comparisons whose
    labels tie count 1/2.
    """
    chosen, rejected = (
        (scored.chosen_words, scored.rejected_words) if by_words else (scored.chosen, scored.rejected)
    )  # fmt: skip
    if layout != "rewardbench2":
        names = [
            f"{k}/{i}-{j}" for k, i, j in zip(scored.item, scored.chosen_index, scored.rejected_index, strict=True)
        ]
        hits = np.where(scored.label_tie, 0.5, pair_hits(chosen, rejected, ties))
        return Units(names, scored.subset, scored.prompt, hits)
    rows = clusters_of(scored.item)
    of_items: list[float] = []
    for at in rows.values():
        worst = chosen[at].min()
        others = {j: r for j, r in zip(scored.rejected_index[at].tolist(), rejected[at].tolist(), strict=True)}
        tied = sum(r == worst for r in others.values())
        hit = float(worst > max(others.values()))
        if tied and worst == max(others.values()):
            hit = 1 / (1 + tied) if ties == "half" else TIE_CREDIT[ties]
        of_items.append(hit)
    first = [at[0] for at in rows.values()]
    return Units(list(rows), [scored.subset[i] for i in first], [scored.prompt[i] for i in first], np.array(of_items))


def paired_difference(model: Units, first: Units, *, draws: int, seed: int) -> dict:
    """Accuracy of `model` minus that of `first` over the units that both have, as `mean_difference` has it."""
    other = {name: i for i, name in enumerate(first.names)}
    both = [(i, other[name]) for i, name in enumerate(model.names) if name in other]
    both = [(i, j) for i, j in both if not (math.isnan(model.hits[i]) or math.isnan(first.hits[j]))]
    if not both:
        return {"mean": None, "lo": None, "hi": None, "n": 0, "clusters": 0, "differing": 0, "interval": None}
    difference = np.array([model.hits[i] - first.hits[j] for i, j in both])
    return mean_difference(difference, [model.prompt[i] for i, _ in both], draws=draws, seed=seed)


def expected_calibration_error(delta: Array, bins: int = ECE_BINS) -> float:
    """Expected calibration error of p = sigmoid(delta) (Guo et al. 2017).

    delta [n] is the reward of the chosen response minus that of the rejected one. As the chosen response is always the
    first, the label is constant, and p itself cannot be binned against it. So confidence is sigmoid(|delta|) in
    [1/2, 1], a pair is correct if delta > 0 (1/2 for a tie), and the `bins` have equal width.
    """
    confidence = _sigmoid(np.abs(delta))
    correct = pair_accuracy(delta, np.zeros_like(delta))
    at = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(at, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(delta))


def negative_log_likelihood(delta: Array, temperature: float = 1.0) -> float:
    """Mean of -log sigmoid(delta / temperature), in nats."""
    return float(np.mean(np.logaddexp(0.0, -delta / temperature)))


def fit_temperature(delta: Array) -> dict:
    """Temperature T > 0 that maximises the likelihood of the labels under sigmoid(delta / T) (Guo et al. 2017).

    The likelihood is concave in 1 / T, so its derivative has at most one root, which bisection finds. Without a root, T
    is the bound that it tends to, and `bound` is "low" (every pair is right) or "high" (rewards are worse than chance).
    T is None if all deltas are 0.
    """
    scale = float(np.sqrt(np.mean(delta**2)))
    if scale == 0:
        return {"temperature": None, "bound": None}
    unit = delta / scale
    slope = lambda log_b: float(np.mean(unit * _sigmoid(-math.exp(log_b) * unit)))  # noqa: E731
    lo, hi = -math.log(TEMPERATURE_RANGE), math.log(TEMPERATURE_RANGE)
    if slope(lo) <= 0:
        return {"temperature": scale * TEMPERATURE_RANGE, "bound": "high"}
    # Without a wrong pair there is no root, but in float64 the slope at the end is 0, not above it.
    if (unit >= 0).all() or slope(hi) > 0:
        return {"temperature": scale / TEMPERATURE_RANGE, "bound": "low"}
    for _ in range(60):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if slope(middle) > 0 else (lo, middle)
    return {"temperature": scale / math.exp((lo + hi) / 2), "bound": None}


def pearson(x: Array, y: Array) -> float | None:
    """Pearson correlation of x [n] and y [n]; None if either is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Array, y: Array) -> float | None:
    """Correlation of ranks, where equal values have their mean rank; None if either is constant."""
    return pearson(ranks(x), ranks(y))


def ranks(x: Array) -> Array:
    """[n], from 1; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def measure(
    rows: Sequence[ComparisonRow], layout: str, *, ties: Ties = "half", draws: int = 2000, seed: int = 1
) -> dict:
    """All metrics of one model on one set; undefined ones are None."""
    scored = Scored.of(rows)
    counted = units(scored, layout, ties)
    by_subset = {
        name: mean_with_intervals(counted.hits[at], [counted.prompt[i] for i in at], draws=draws, seed=seed)
        for name, at in sorted(clusters_of(counted.subset).items())
    }
    means = [m["mean"] for m in by_subset.values() if m["mean"] is not None]
    longest = units(scored, layout, "half", by_words=True).hits
    labelled = ~scored.label_tie
    delta = (scored.chosen - scored.rejected)[labelled]
    return {
        "layout": layout,
        "comparisons": len(rows),
        "prompts": len(set(scored.prompt)),
        "ties": ties,
        "reward_ties": int((scored.chosen == scored.rejected)[labelled].sum()),
        "label_ties": int(scored.label_tie.sum()),
        "accuracy": mean_with_intervals(counted.hits, counted.prompt, draws=draws, seed=seed),
        "macro_accuracy": float(np.mean(means)) if means else None,
        "subsets": by_subset,
        "longest_answer_accuracy": float(longest.mean()),
        "calibration": _calibration(delta) if len(delta) else None,
        "length": _length(scored, labelled),
        "rewards": _summary(scored.responses()[0]),
    }


def _calibration(delta: Array) -> dict:
    fitted = fit_temperature(delta)
    after = delta / fitted["temperature"] if fitted["temperature"] else delta
    return {
        "pairs": len(delta),
        "ece": expected_calibration_error(delta),
        "nll_nats": negative_log_likelihood(delta),
        **fitted,
        "ece_at_temperature": expected_calibration_error(after),
        "nll_nats_at_temperature": negative_log_likelihood(after),
    }


def _length(scored: Scored, labelled: NDArray[np.bool_]) -> dict:
    """Correlations of reward with length in words: over responses, and of the differences within pairs."""
    rewards, words = scored.responses()
    delta = (scored.chosen - scored.rejected)[labelled], (scored.chosen_words - scored.rejected_words)[labelled]
    return {
        "pearson": pearson(rewards, words),
        "spearman": spearman(rewards, words),
        "pearson_within_pairs": pearson(*delta),
        "spearman_within_pairs": spearman(*delta),
        "chosen_words": float(scored.chosen_words.mean()),
        "rejected_words": float(scored.rejected_words.mean()),
    }


def _summary(rewards: Array) -> dict:
    sd = float(rewards.std(ddof=1)) if len(rewards) > 1 else None
    return {"mean": float(rewards.mean()), "sd": sd, "min": float(rewards.min()), "max": float(rewards.max())}


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))  # never overflows
