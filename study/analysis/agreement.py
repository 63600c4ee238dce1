"""How far a proxy agrees with gold before anything is optimised, what members of an ensemble have in common, and which
of these numbers predicts what optimisation will do. Pure functions of pools; no models, no files.

Shape legend: S members (seeds of a condition), P prompts, N samples a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bon.estimators import count_lower_in_both
from bon.gains import gains, scale
from bon.pools import Pools
from rm.evaluation.metrics import expected_calibration_error, fit_temperature, ranks, spearman
from study.analysis.bootstrap import Array, Interval, crossed_draws, interval

STATIC = ("accuracy", "pearson", "spearman", "kendall", "tail_spearman", "ece", "sd_within")
"""Numbers of `agreement` that can predict an outcome."""
LEAST_MODELS, LEAST_CONDITIONS = 6, 6
"""With fewer reward models a rank correlation says nothing; with fewer conditions there is nothing to resample."""
TAIL = 4
"""The tail is the best 1 / TAIL of a prompt's pool by the proxy, but at least four samples."""


def within_prompt_correlation(a: Array, b: Array) -> Interval:
    """Pearson correlation within prompts of [P, N] and [P, N], pooled; its interval by the bootstrap over prompts."""
    x, y = gains(a), gains(b)
    return pooled_correlation((x * y).sum(1), (x * x).sum(1), (y * y).sum(1))


def pooled_correlation(product: Array, first: Array, second: Array) -> Interval:
    """sum(product) / sqrt(sum(first) sum(second)) of sums over prompts [P]; its interval by the bootstrap over them."""
    parts = np.stack([product, first, second], axis=-1)[None].astype(float)  # [1, P, 3]
    of = lambda sums: sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2])  # noqa: E731
    drawn = np.maximum(crossed_draws(parts, 1000, 0), [-np.inf, 1e-12, 1e-12])  # a draw of prompts without spread
    return interval(float(of(parts.mean(axis=(0, 1)))), of(drawn).clip(-1, 1))


def gold_by_proxy(pools: Pools, proxies: Array, bins: int = 10) -> list[dict]:
    """Mean gold gain by quantile of the proxy, the upper tail ever finer: where a proxy stops meaning gold."""
    gold, proxy = gains(pools.gold).ravel(), proxies.mean(axis=0).ravel()
    edges = np.unique([*np.linspace(0, 1, bins, endpoint=False), 0.95, 0.98, 0.99, 1.0])
    order, count = proxy.argsort(), len(proxy)
    rows = []
    for lo, hi in zip(edges[:-1], edges[1:], strict=True):
        part = order[int(lo * count) : int(hi * count)]
        if len(part) >= 10:
            error = float(gold[part].std(ddof=1) / np.sqrt(len(part)))
            rows.append({"quantile": float((lo + hi) / 2), "proxy": float(proxy[part].mean()),
                         "gold": float(gold[part].mean()), "se": error, "samples": len(part)})  # fmt: skip
    return rows


def agreement(proxy: Array, gold: Array) -> dict[str, Interval | float | None]:
    """What raw scores [P, N] of a proxy say about those of gold, within prompts.

    accuracy: of pairs of one prompt's samples, drawn from the reference and of unequal gold, a tie of the proxy 1/2.
    pearson, spearman, kendall (tau-b): pooled over prompts. tail_spearman: among the samples that the proxy ranks
    highest, where best-of-n chooses; None where they do not vary. ece and temperature: of sigmoid(difference) over
    disjoint pairs. sd_within, sd_between: of the proxy's raw rewards, within prompts and of their means.
    """
    ranked = lambda x: np.apply_along_axis(ranks, 1, x)  # noqa: E731
    tail, N = max(4, proxy.shape[1] // TAIL), proxy.shape[1]
    top = np.argsort(-proxy, axis=1, kind="stable")[:, : min(tail, N)]
    part = [np.take_along_axis(x, top, axis=1) for x in (proxy, gold)]
    varies = all(np.ptp(x, axis=1).any() for x in part)
    half = N - N % 2
    higher = np.sign(gold[:, 0:half:2] - gold[:, 1:half:2])
    delta = ((proxy[:, 0:half:2] - proxy[:, 1:half:2]) * higher)[higher != 0]
    accuracy, kendall = _pairs(proxy, gold)
    return {
        "accuracy": accuracy,
        "pearson": within_prompt_correlation(proxy, gold),
        "spearman": within_prompt_correlation(ranked(proxy), ranked(gold)),
        "kendall": kendall,
        "tail_spearman": within_prompt_correlation(*map(ranked, part)) if varies else None,
        "ece": expected_calibration_error(delta) if len(delta) else None,
        "temperature": fit_temperature(delta)["temperature"] if len(delta) else None,
        "sd_within": scale(proxy),
        "sd_between": float(proxy.mean(axis=1).std(ddof=1)),
    }


def _pairs(proxy: Array, gold: Array) -> tuple[Interval, Interval]:
    """Accuracy over all pairs of a prompt, and Kendall's tau-b."""
    N = proxy.shape[1]
    tied = lambda x: sum(c * (c - 1) // 2 for c in np.unique(x, return_counts=True)[1].tolist())  # noqa: E731
    rows = []
    for p, g in zip(proxy, gold, strict=True):
        agree, differ = count_lower_in_both(p, g).sum(), count_lower_in_both(p, -g).sum()
        rows.append((agree, differ, N * (N - 1) // 2 - tied(p), N * (N - 1) // 2 - tied(g)))
    agree, differ, proxies, golds = np.array(rows, dtype=float).T
    right = agree + (golds - agree - differ) / 2  # pairs that only the proxy ties count 1/2
    # A share of sums is a correlation of the form that is resampled, where both parts below are the same.
    return pooled_correlation(right, golds, golds), pooled_correlation(agree - differ, proxies, golds)


def members(stacked: Array, gold: Array) -> dict[str, float]:
    """What the members [S, P, N] (gains) of an ensemble have in common, S >= 2; means over pairs of members.

    correlation of their gains, and of their errors: what is left of each after its regression on gold. Errors that
    members share survive any combination of them (Eisenstein et al. 2312.09244); `tail_error_correlation` is that
    among samples that their mean ranks highest.
    """
    gold = gains(gold)
    errors = stacked - np.stack([(m * gold).sum() / (gold * gold).sum() * gold for m in stacked])
    top = np.argsort(-stacked.mean(axis=0), axis=1)[:, : max(4, gold.shape[1] // TAIL)]
    tail = np.take_along_axis(errors, top[None], axis=2)
    return {
        "correlation": _mean_correlation(stacked),
        "error_correlation": _mean_correlation(errors),
        "tail_error_correlation": _mean_correlation(tail),
    }


def _mean_correlation(stacked: Array) -> float:
    centred = stacked - stacked.mean(axis=2, keepdims=True)
    table = np.corrcoef(centred.reshape(len(stacked), -1))
    return float(table[np.triu_indices(len(stacked), 1)].mean())


def prediction(rows: Sequence[Mapping], outcomes: Sequence[str], draws: int = 1000, seed: int = 0) -> list[dict]:
    """Rank correlation over reward models of each static number with each outcome.

    Args:
        rows: one a reward model, with `condition`, numbers of `agreement` (an `Interval` counts by its mean) and
            outcomes. Numbers that some of them lack are left out.

    Returns:
        Rows of metric, outcome, spearman, lo, hi, models, conditions; empty below LEAST_MODELS reward models. The
        interval is a bootstrap over conditions, since seeds of one are not independent; None below LEAST_CONDITIONS.
    """
    if len(rows) < LEAST_MODELS:
        return []
    names = list(dict.fromkeys(row["condition"] for row in rows))
    of = np.array([names.index(row["condition"]) for row in rows])
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    found = []
    for metric in (*STATIC, "accuracy_gold"):
        values = [row.get(metric) for row in rows]
        if any(v is None for v in values):
            continue
        x = np.array([getattr(v, "mean", v) for v in values], dtype=float)
        for outcome in outcomes:
            y = np.array([row[outcome] for row in rows], dtype=float).round(9)  # a drop of 0 is 0 but for rounding
            if (r := spearman(x, y)) is None:
                continue
            bounds = interval(r, _spearman_draws(x, y, drawn[:, of])) if len(names) >= LEAST_CONDITIONS else None
            found.append({"metric": metric, "outcome": outcome, "spearman": r, "lo": bounds and bounds.lo,
                          "hi": bounds and bounds.hi, "models": len(rows), "conditions": len(names)})  # fmt: skip
    return found


def _spearman_draws(x: Array, y: Array, weights: NDArray[np.int64]) -> Array:
    """Rank correlations of x [M] and y [M] with each row counted as often as weights [B, M] say; draws in which one of
    them is constant are left out."""
    ranked = [
        weights @ (v[None] < v[:, None]).T + (weights @ (v[None] == v[:, None]).T + 1) / 2 for v in (x, y)
    ]  # [B, M] each, equal values sharing the mean of their ranks
    total = weights.sum(axis=1, keepdims=True)
    a, b = (r - (weights * r).sum(axis=1, keepdims=True) / total for r in ranked)
    cross, one, two = ((weights * u * v).sum(axis=1) for u, v in ((a, b), (a, a), (b, b)))
    varies = (one > 1e-9) & (two > 1e-9)
    return cross[varies] / np.sqrt(one[varies] * two[varies])
