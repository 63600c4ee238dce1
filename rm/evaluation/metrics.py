"""Metrics of a reward model on comparisons: pure functions of rewards, lengths and labels, in float64.

n comparisons, u units (what accuracy counts: a comparison, or an item of several candidates in RewardBench 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Ties = Literal["half", "drop", "wrong"]
TIE_CREDIT: dict[str, float] = {"half": 0.5, "drop": math.nan, "wrong": 0.0}
Z95 = 1.96
ECE_BINS = 10
TEMPERATURE_RANGE = 1e3
"""Temperatures are sought within this factor of the root mean square of the margins."""


def pair_accuracy(preferred: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n] 1 where the preferred response has the higher reward, 0 where the lower, 1/2 on a tie."""
    return (preferred > other) + 0.5 * (preferred == other)


def accuracy_with_interval(hits: np.ndarray, z: float = Z95) -> dict[str, float]:
    """Mean and Wilson score interval (95% at z = 1.96; Wilson 1927) of hits [n] in {0, 1/2, 1}."""
    n, p = len(hits), float(np.mean(hits))
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"mean": p, "lo": center - half, "hi": center + half, "n": n}


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
        column = lambda name, kind: np.array([row[name] for row in rows], dtype=kind)  # noqa: E731
        return cls(
            [row["item"] for row in rows], [row["subset"] for row in rows], [row["prompt_id"] for row in rows],
            column("chosen_index", np.int64), column("rejected_index", np.int64), column("label_tie", np.bool_),
            column("reward_chosen", np.float64), column("reward_rejected", np.float64),
            column("chosen_words", np.float64), column("rejected_words", np.float64),
        )  # fmt: skip

    def responses(self) -> tuple[Array, Array]:
        """Rewards and words of the responses [2n or fewer]: a candidate of several comparisons counts once."""
        found = {}
        for i, item in enumerate(self.item):
            found[item, "chosen", self.chosen_index[i]] = self.chosen[i], self.chosen_words[i]
            found[item, "rejected", self.rejected_index[i]] = self.rejected[i], self.rejected_words[i]
        rewards, words = np.array(list(found.values())).T
        return rewards, words


@dataclass(frozen=True, slots=True)
class Units:
    """What accuracy is the mean of."""

    names: list[str]
    subset: list[str]
    prompt: list[str]
    hits: Array
    """[u] in [0, 1]; NaN where a tie is dropped."""


def pair_hits(chosen: Array, rejected: Array, ties: Ties = "half") -> Array:
    """[n] 1 or 0; on equal values 1/2, NaN (drop) or 0 (wrong)."""
    return np.where(chosen == rejected, TIE_CREDIT[ties], (chosen > rejected).astype(np.float64))


def units(scored: Scored, layout: str, ties: Ties = "half", *, by_words: bool = False) -> Units:
    """Units of a set and their hits; `by_words` prefers the longer answer instead of the higher reward.

    Layout `rewardbench2`: an item is a hit when each of its chosen answers beats each rejected one (all but Ties have
    one chosen answer); the worst chosen tied with k rejected at the top counts 1 / (1 + k) with `half`, as in the
    authors' code. Else each comparison is a unit. Comparisons whose labels tie count 1/2 whatever their values.
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
    rows = _groups(scored.item)
    hits = []
    for at in rows.values():
        worst = chosen[at].min()
        others = {j: r for j, r in zip(scored.rejected_index[at].tolist(), rejected[at].tolist(), strict=True)}
        tied = sum(r == worst for r in others.values())
        hit = float(worst > max(others.values()))
        if tied and worst == max(others.values()):
            hit = 1 / (1 + tied) if ties == "half" else TIE_CREDIT[ties]
        hits.append(hit)
    first = [at[0] for at in rows.values()]
    return Units(list(rows), [scored.subset[i] for i in first], [scored.prompt[i] for i in first], np.array(hits))


def mean_with_intervals(hits: Array, clusters: Sequence[str], *, draws: int, seed: int) -> dict:
    """Mean of the hits [u] that are not NaN, with its Wilson interval and a bootstrap over clusters.

    `lo`, `hi` are those of `interval`: "cluster bootstrap" where a cluster holds several units, which are then not
    independent, else "wilson". None where one cluster holds all: it says nothing of other clusters.
    """
    kept = ~np.isnan(hits)
    names = [c for c, keep in zip(clusters, kept, strict=True) if keep]
    if not names:
        return {"mean": None, "lo": None, "hi": None, "n": 0, "clusters": 0, "interval": None, "wilson": None}
    found = accuracy_with_interval(hits[kept])
    many = len(set(names))
    found |= {"clusters": many, "interval": "wilson", "wilson": [found["lo"], found["hi"]]}
    if many < len(names):
        found["lo"], found["hi"] = cluster_bootstrap(hits[kept], names, draws=draws, seed=seed)
        found["interval"] = None if found["lo"] is None else "cluster bootstrap"
    return found


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[str], *, draws: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """95% percentile interval of the mean of values [u] when whole clusters are drawn with replacement.

    The mean is over units, so a draw with larger clusters has more of them (a ratio of sums). It is too narrow for
    few clusters (below some 20), and (None, None) for one.
    """
    groups = list(_groups(clusters).values())
    if len(groups) < 2:
        return None, None
    values = np.asarray(values, dtype=np.float64)
    sums = np.array([[values[at].sum(), len(at)] for at in groups])
    rng, size = np.random.default_rng(seed), len(groups)
    step = max(1, 10**7 // size)  # counts of one block stay below 80 MB
    blocks = [min(step, draws - done) for done in range(0, draws, step)]
    totals = np.concatenate([rng.multinomial(size, np.full(size, 1 / size), size=b) @ sums for b in blocks])
    lo, hi = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(lo), float(hi)


def paired_difference(model: Units, first: Units, *, draws: int, seed: int) -> dict:
    """Accuracy of `model` less that of `first` over the units that both have, with a bootstrap over prompts."""
    other = {name: i for i, name in enumerate(first.names)}
    both = [(i, other[name]) for i, name in enumerate(model.names) if name in other]
    both = [(i, j) for i, j in both if not (math.isnan(model.hits[i]) or math.isnan(first.hits[j]))]
    if not both:
        return {"mean": None, "lo": None, "hi": None, "n": 0, "clusters": 0}
    difference = np.array([model.hits[i] - first.hits[j] for i, j in both])
    prompts = [model.prompt[i] for i, _ in both]
    lo, hi = cluster_bootstrap(difference, prompts, draws=draws, seed=seed)
    return {"mean": float(difference.mean()), "lo": lo, "hi": hi, "n": len(both), "clusters": len(set(prompts))}


def expected_calibration_error(delta: Array, bins: int = ECE_BINS) -> float:
    """ECE of p = sigmoid(delta [n]), delta = reward of the chosen less that of the rejected answer (Guo et al. 2017).

    The chosen answer always stands first, so the label is constant and p itself cannot be binned against it. Folded:
    confidence = sigmoid(|delta|) in [1/2, 1], correct = delta > 0 (1/2 on ties), `bins` of equal width.
    """
    confidence = _sigmoid(np.abs(delta))
    correct = pair_accuracy(delta, np.zeros_like(delta))
    at = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(at, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(delta))


def negative_log_likelihood(delta: Array, temperature: float = 1.0) -> float:
    """Mean of -log sigmoid(delta / temperature), nats."""
    return float(np.mean(np.logaddexp(0.0, -delta / temperature)))


def fit_temperature(delta: Array) -> dict:
    """Temperature T > 0 that maximises the likelihood of the labels under sigmoid(delta / T) (Guo et al. 2017).

    The likelihood is concave in 1 / T, so its derivative has at most one root, found by bisection. Where it has none
    T is the `bound` it runs to: "low" when every pair is right, "high" when rewards are worse than chance. T is None
    when all deltas are 0.
    """
    scale = float(np.sqrt(np.mean(delta**2)))
    if scale == 0:
        return {"temperature": None, "bound": None}
    unit = delta / scale
    slope = lambda log_b: float(np.mean(unit * _sigmoid(-math.exp(log_b) * unit)))  # noqa: E731
    lo, hi = -math.log(TEMPERATURE_RANGE), math.log(TEMPERATURE_RANGE)
    if slope(lo) <= 0:
        return {"temperature": scale * TEMPERATURE_RANGE, "bound": "high"}
    # Perfectly separated rewards have no root; in float64 the slope is then 0 at the end, not below.
    if (unit >= 0).all() or slope(hi) > 0:
        return {"temperature": scale / TEMPERATURE_RANGE, "bound": "low"}
    for _ in range(60):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if slope(middle) > 0 else (lo, middle)
    return {"temperature": scale / math.exp((lo + hi) / 2), "bound": None}


def pearson(x: Array, y: Array) -> float | None:
    """Correlation of x [n] and y [n]; None where either is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Array, y: Array) -> float | None:
    """Correlation of ranks, equal values having their mean rank."""
    return pearson(ranks(x), ranks(y))


def ranks(x: Array) -> Array:
    """[n] from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def measure(
    rows: Sequence[ComparisonRow], layout: str, *, ties: Ties = "half", draws: int = 2000, seed: int = 1
) -> dict:
    """Every number of one model on one set, from the rows of its table; undefined numbers are None."""
    scored = Scored.of(rows)
    found = units(scored, layout, ties)
    by_subset = {
        name: mean_with_intervals(found.hits[at], [found.prompt[i] for i in at], draws=draws, seed=seed)
        for name, at in sorted(_groups(found.subset).items())
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
        "accuracy": mean_with_intervals(found.hits, found.prompt, draws=draws, seed=seed),
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
    """Correlations of reward with length in words: over responses, and of differences within pairs."""
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


def _groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> positions, in order of first appearance."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name, []).append(i)
    return found
