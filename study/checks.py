"""What would make a study worthless, looked for: each check is a row of `checks.json`, and failures head the report.

The numbers in brackets are those of the list that they come from, docs/study.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bon.pools import Pools
from core.config import Config
from core.data.near import NEAR, Known
from study.analysis.agreement import within_prompt_correlation
from study.analysis.verdict import ENOUGH_SEEDS
from study.records import Results, Series

ENOUGH_PROMPTS = 500
MISMATCH = 0.1
"""Nats a token by which log-probs of vLLM and the trainer may differ: rounding to bfloat16 gives 0.03 to 0.05."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str


def leakage(prompts: Sequence[Mapping], evaluated: Iterable[str], trained: Iterable[str]) -> Check:
    """(1) No evaluated prompt was trained on, exactly or nearly; by prompt, not by row.

    Args:
        prompts: rows of prompt_id, split and prompt (messages).
        evaluated, trained: prompt ids.
    """
    evaluated, trained = set(evaluated), set(trained)
    texts = {row["prompt_id"]: row["prompt"] for row in prompts}
    known = Known(texts[i] for i in trained if i in texts)
    seen = Counter("exactly" if i in trained else known.repeated_by(texts[i]) for i in evaluated if i in texts)
    return Check(
        "evaluated prompts were not trained on", not seen["exactly"] and not seen["nearly"],
        f"{seen['exactly']} of {len(evaluated)} were, {seen['nearly']} nearly (word trigrams {NEAR:g} alike)",
    )  # fmt: skip


def gold_untouched(manifests: Mapping[str, Mapping]) -> Check:
    """(2) Nothing that is trained reads gold: `manifests` are those of stages rm and ppo."""
    readers = sorted(
        name for name, m in manifests.items()
        if any(k.split("=")[0].startswith("gold") for k in (*m["config"], *m["inputs"]))
    )  # fmt: skip
    return Check(
        "training never reads gold", not readers, ", ".join(readers) or f"{len(manifests)} trainings looked at"
    )


def same_scoring(results: Results) -> Check:
    """(3) Policies at step 0 are the reference, so gold must give them what it gave the pools: the same template,
    truncation and decoding."""
    name = "gold scores step 0 of policies as it scores the pools"
    if not results.pools.of_reference:
        return Check(name, True, "not comparable: the pools are sampled from another distribution")
    off = []
    for curve in results.curves:
        if curve.method == "ppo" and curve.metric == "gold" and int(curve.x[0]) == 0:
            error = float(curve.draws[:, 0].std(ddof=1))
            if abs(curve.mean[0]) > 4 * error and error > 0:
                off.append(f"{curve.rm} {curve.mean[0]:+.2f} SD, SE {error:.2f}")
    return Check(name, not off, "; ".join(off) or "within 4 SE")


def one_reference(cfg: Config) -> Check:
    """(3) Best-of-n and policies start from one distribution, or their curves have two origins and two KLs."""
    policies, bon = cfg.generation.temperature, cfg.bon
    here = bon.temperature or policies
    both = f"temperature {policies:g}, all tokens"
    apart = (
        f"pools have temperature {here:g} and top-p {bon.top_p:g}, policies {both}: each KL is from its own "
        "distribution, and gains of policies begin at their own step 0"
    )
    return Check(
        "best-of-n and policies start from one distribution", cfg.one_reference, both if cfg.one_reference else apart
    )


def aligned(results: Results) -> Check:
    """(4) Each proxy agrees with gold within prompts; shuffled columns would not."""
    found = {n: within_prompt_correlation(p, results.pools.gold) for n, p in results.pools.proxies.items()}
    wrong = [f"{name} {i}" for name, i in found.items() if not i.lo > 0]
    least = min(found.values(), key=lambda i: i.mean)
    return Check(
        "proxies agree with gold within prompts", not wrong, "; ".join(wrong) or f"correlations from {least.mean:+.2f}"
    )


def length_confound(pools: Pools, results: Results) -> Check:
    """(6) Gold is not length: weak correlation, and the longest response gains little of what the oracle does."""
    if pools.length is None or not np.ptp(pools.length, axis=1).any():
        return Check("gold is not length", False, "no lengths to look at")
    r = within_prompt_correlation(pools.length, pools.gold)
    longest, best = (next(c for c in results.curves if c.rm == name) for name in ("longest", "oracle"))
    gain, most = float(longest.mean[-1]), float(best.mean[-1])
    return Check(
        "gold is not length", abs(r.mean) < 0.5 and gain < 0.5 * most,
        f"correlation {r}; longest of {longest.x[-1]} gains {gain:+.2f} SD of gold, the oracle {most:+.2f}",
    )  # fmt: skip


def kl_estimates(series: Mapping[str, Series]) -> Check:
    """(7) Two unbiased estimates of one KL agree: a wrong sign, span or temperature drives them apart."""
    worst, wrong = 0.0, []
    for name, one in series.items():
        rows = [r for r in one.rows if "kl_k1" in r and "kl_rb" in r]
        by_step: dict[int, list[float]] = {}
        for r in rows:
            by_step.setdefault(r["step"], []).append(r["kl_k1"] - r["kl_rb"])
        for step, gap in by_step.items():
            error = max(float(np.std(gap, ddof=1)) / len(gap) ** 0.5, 1e-6) if len(gap) > 1 else np.inf
            z = abs(float(np.mean(gap))) / error
            worst = max(worst, z if abs(np.mean(gap)) > 1e-3 else 0.0)
            wrong += [f"{name} step {step}"] if z > 5 and abs(np.mean(gap)) > 1e-3 else []
    return Check("two estimates of KL agree", not wrong, ", ".join(wrong) or f"at most {worst:.1f} SE apart")


def sampler_agrees(series: Mapping[str, Series]) -> Check:
    """(7) vLLM sampled from the weights that were evaluated: its log-probs are the trainer's up to rounding."""
    gaps = []
    for one in series.values():
        rows = [r for r in one.rows if "logp" in r and "logp_sampler" in r]
        if tokens := sum(r["n_tokens"] for r in rows):
            gaps.append(sum(abs(r["logp"] - r["logp_sampler"]) for r in rows) / tokens)
    worst = max(gaps, default=0.0)
    detail = f"log-probs differ by {worst:.3f} nats a token" if gaps else "no log-probs to compare"
    return Check("vLLM sampled from the weights that were evaluated", worst < MISMATCH, detail)


def bound_is_close(results: Results) -> Check:
    """(7) The bound log n - (n-1)/n overstates the KL where responses repeat or scores tie."""
    rows = [r for r in results.kl if r["n"] > 1]
    if not rows:
        return Check("the KL bound of best-of-n is close", True, "n = 1 only")
    last = max(r["n"] for r in rows)
    # A pool without ties has 98 to 99% of the bound even at n = N.
    worst = min((r["pool"] / r["bound"], r["rm"]) for r in rows if r["n"] == last)
    return Check("the KL bound of best-of-n is close", worst[0] > 0.8, f"pools have {worst[0]:.0%} of it at n = {last}")


def enough(results: Results, series: Mapping[str, Series], policy_seeds: int) -> list[Check]:
    """(8) Seeds and prompts."""
    pools = results.pools
    few = [f"{name} {len(m)}" for name, m in results.conditions.items() if len(m) < ENOUGH_SEEDS]
    checks = [
        Check(f"at least {ENOUGH_SEEDS} reward models a condition", not few, ", ".join(few) or "all have"),
        Check(f"at least {ENOUGH_PROMPTS} prompts", pools.gold.shape[0] >= ENOUGH_PROMPTS, f"{pools.gold.shape[0]}"),
    ]
    if series:
        ok = policy_seeds >= ENOUGH_SEEDS
        checks.append(Check(f"at least {ENOUGH_SEEDS} policies a condition", ok, f"{policy_seeds}"))
    return checks


def label_noise(configured: Mapping[str, float], realised: Mapping[str, float], validation: int) -> Check:
    """(9) As many labels were flipped as configured, and none of the validation pairs."""
    off = [f"{n} {realised[n]:.3f} for {a:.3f}" for n, a in configured.items() if abs(realised[n] - a) > 0.01]
    if validation:
        off.append(f"{validation} validation labels are flipped")
    return Check("label noise is what was configured", not off, ", ".join(off) or f"{len(configured)} reward models")


def gold_lineage(kind: str, gold_base: str | None, proxy_base: str) -> Check:
    """(10) A gold of the proxies' own base shares their errors and understates the gap."""
    if kind in ("judge", "linear"):
        return Check("gold is no relative of the proxies", True, f"gold is the built-in {kind}")
    ok = gold_base is not None and gold_base != proxy_base
    return Check(
        "gold is no relative of the proxies",
        ok,
        f"gold from {gold_base or 'an unknown base'}, proxies from {proxy_base}",
    )


def golds_agree(results: Results) -> list[Check]:
    """(10) A second gold gives the same verdicts; no row without one. What only one of them saw is no finding."""
    if not results.golds:
        return []
    other = [f"{r['rm']}: {r['verdict']}, then {r['second_verdict']}" for r in results.golds
             if r["verdict"] != r["second_verdict"]]  # fmt: skip
    ceiling = f"they correlate by {results.golds[0]['agreement']:+.2f} within prompts"
    return [Check("a second gold gives the same verdicts", not other, "; ".join([*other, ceiling]))]


def degenerate(samples: Sequence[Mapping], what: str) -> list[Check]:
    """(11) Responses that end, differ and are not empty; rows of prompt_id, response and finished."""
    ended = float(np.mean([bool(s["finished"]) for s in samples]))
    empty = float(np.mean([not s["response"].strip() for s in samples]))
    distinct = len({(s["prompt_id"], s["response"]) for s in samples}) / len(samples)
    return [
        Check(f"responses end by themselves ({what})", ended > 0.5, f"{ended:.0%} do"),
        Check(f"few empty responses ({what})", empty < 0.02, f"{empty:.1%}"),
        Check(f"responses differ ({what})", distinct > 0.9, f"{distinct:.0%} distinct"),
    ]


def equal_cost(steps: Mapping[str, int], epochs: Iterable[int] = ()) -> Check:
    """(12) Reward models of one matrix saw equally many pairs; name -> pairs of its training, of one data size.

    Args:
        epochs: passes over these pairs that the configuration asks for; several are on purpose, and are named.
    """
    kinds, passes = sorted(set(steps.values())), sorted(set(epochs))
    detail = f"pairs seen: {', '.join(map(str, kinds))}"
    if len(passes) > 1:
        detail += f"; in {', '.join(map(str, passes[:-1]))} or {passes[-1]} epochs, as rm.variants say"
    return Check("reward models compared cost alike", len(kinds) <= 1, detail)
