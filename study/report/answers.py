"""What a study answers, in sentences for its first screen: what turns and when, which is better, and what is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from study.analysis.bootstrap import Interval
from study.analysis.verdict import (
    CANNOT_CONCLUDE,
    DOES_NOT_HELP,
    ENOUGH_SEEDS,
    HARMS,
    NO_TURN_OVER,
    NOT_OPTIMISED,
    OVER_OPTIMISED,
)
from study.checks import Check
from study.records import Results
from study.report.words import coefficients, in_words, of_sizes, of_variant, optimised_by

MOST = 4
"""Sentences of one kind; the tables have the rest."""
SHOWN = 3
"""Of the curves that are not decided."""
LEVEL = 0.05
"""Of p-values corrected for the number of comparisons."""


@dataclass
class Answers:
    turns: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """A condition under best-of-n, or policies of one condition."""

    method: str
    """In words that stand before it."""
    words: str
    facts: dict
    at: Callable[[str], str]
    """"peak" or "end" -> where that is, in words."""
    ensemble: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.words}"


def answers(results: Results, checks: Sequence[Check]) -> Answers:
    """The sentences; each with its interval, in SD within prompts of the reference's samples."""
    subjects = [*best_of_n(results), *trained(results)]
    kinds: dict[str, list[Subject]] = {}
    for subject in subjects:
        kinds.setdefault(subject.facts["verdict"].kind, []).append(subject)
    said = [*turns(kinds), *singly(results)] or ["Whether gold turns is not known for any of the curves: see below."]
    return Answers(said, better(results), unknown(results, kinds.get(CANNOT_CONCLUDE, []), checks))


def best_of_n(results: Results) -> list[Subject]:
    def where(f: dict) -> Callable[[str], str]:
        peak = f"n = {f['peak_n'].mean:.0f} (KL {f['peak_kl']:.1f} nats)"
        return lambda at: peak if at == "peak" else f"n = {f['n']} (KL {f['kl']:.1f} nats)"

    return [
        Subject("Best-of-n by", in_words(results, n), f, where(f), n not in results.conditions)
        for n, f in results.findings.items()
    ]


def trained(results: Results) -> list[Subject]:
    """Policies of several seeds together; one by itself where it has no others."""

    def kl(at_peak: float, f: dict) -> Callable[[str], str]:
        return lambda at: f"a KL of {at_peak if at == 'peak' else f['kl']:.1f} nats"

    found, seen = [], set()
    for name, f in results.pooled.items():
        seen |= set(f["policies"])
        if f["seeds"] > 1:
            words = f"{in_words(results, name)} ({f['seeds']} seeds)"
            found.append(
                Subject(" ".join(optimised_by(results)), words, f, kl(f["peak_kl"].mean, f), f["rule"] is not None)
            )
        else:
            found += _alone(results, f["policies"][0], kl)
    for name in results.policies.keys() - seen:
        found += _alone(results, name, kl)
    return found


def _alone(results: Results, name: str, kl: Callable) -> list[Subject]:
    f = results.policies[name]
    method = " ".join(optimised_by(results)) if f["condition"] else "The run"
    return [Subject(method, f"{in_words(results, name)} (one seed)", f, kl(f["peak_kl"], f))]


def turns(kinds: dict[str, list[Subject]]) -> list[str]:
    """What turned, what harmed, what did neither."""
    said = [_turn(s) for s in _largest(kinds.get(OVER_OPTIMISED, []), "drop")]
    said += [_harm(s) for s in kinds.get(HARMS, [])[:MOST]]
    left = sum(len(kinds.get(kind, [])) for kind in (OVER_OPTIMISED, HARMS)) - len(said)
    said += [f"So do {left} more: see the table."] if left else []
    said += _listed(kinds.get(NO_TURN_OVER, []), "gold did not turn; it rose")
    said += _listed(kinds.get(DOES_NOT_HELP, []), "gold hardly moved,")
    said += _listed(kinds.get(NOT_OPTIMISED, []), "the proxy itself did not rise; gold changed")
    return said


def singly(results: Results) -> list[str]:
    """Single policies that turn or harm, where the policies of their condition decide nothing together."""
    open_ = [
        name for f in results.pooled.values() if f["seeds"] > 1 and f["verdict"].kind == CANNOT_CONCLUDE
        for name in f["policies"]
    ]  # fmt: skip
    said = []
    for kind, happened in ((OVER_OPTIMISED, "peaked and fell"), (HARMS, "fell from the start")):
        found = [(name, results.policies[name]) for name in open_ if results.policies[name]["verdict"].kind == kind]
        if not found:
            continue
        shown = "; ".join(
            f"{in_words(results, name)}, seed {f['seed']}: by {f['drop'].mean:.2f} SD {_range(f['drop'])} at a KL of "
            f"{f['kl']:.0f} nats"
            for name, f in found[:MOST]
        )
        more = f"; and {len(found) - MOST} more" if len(found) > MOST else ""
        said.append(
            f"{optimised_by(results)[0]}: gold {happened} in {len(found)} of {len(open_)} policies ({shown}{more}). "
            "Their seeds differ too much to say it of a condition."
        )
    return said


def _turn(s: Subject) -> str:
    f = s.facts
    rose = f["proxy_since_peak"]
    proxy = f"while the proxy still rose (by {rose.mean:.2f})" if rose.lo > 0 else f"while the proxy changed by {rose}"
    own = f"; {f['over_optimised']} of {f['seeds']} policies turn by themselves" if "over_optimised" in f else ""
    return (
        f"{s}: gold peaked at {s.at('peak')} and fell by {f['drop'].mean:.2f} SD {_range(f['drop'])} by "
        f"{s.at('end')}, {proxy}{own}."
    )


def _harm(s: Subject) -> str:
    gold, proxy = s.facts["gold"], s.facts["proxy"]
    return (
        f"{s}: gold fell from the start, by {-gold.mean:.2f} SD {_range(gold, -1)} to {s.at('end')}, while the proxy "
        f"changed by {proxy.mean:+.2f}."
    )


def _listed(subjects: Sequence[Subject], what: str) -> list[str]:
    """A sentence a method, with all that it is true of: ensembles by their number where there are many."""
    said = []
    for method in dict.fromkeys(s.method for s in subjects):
        own = [s for s in subjects if s.method == method]
        words = [s.words for s in own if not s.ensemble] if len(own) > MOST else [s.words for s in own]
        rest = len(own) - len(words[:MOST])
        more = "ensembles" if rest == sum(s.ensemble for s in own) else "others"
        between = "; " if any("," in w for w in words) else ", "
        named = between.join(words[:MOST]) + (f"{between}and {rest} {more}" if rest else "")
        gains = sorted(s.facts["gold"].mean for s in own)
        span = f"{gains[0]:+.2f}" if len(own) == 1 else f"{gains[0]:+.2f} to {gains[-1]:+.2f}"
        ends = list(dict.fromkeys(s.at("end") for s in own))
        where = ends[0] if len(ends) == 1 else f"{ends[0]} or {ends[1]}" if len(ends) == 2 else f"{ends[0]} and others"
        said.append(f"{method} {named}: {what} by {span} SD up to {where}.")
    return said


@dataclass(frozen=True)
class Compared:
    """One condition less another."""

    where: str
    ours: str
    theirs: str
    sizes: str
    """What both have in common, and other conditions have not."""
    gap: Interval
    p: float

    @property
    def told(self) -> str:
        """How the sentence goes on."""
        if not self.gap.excludes_zero:
            return f"{self.ours} and {self.theirs} are not told apart"
        more = "more" if self.gap.mean > 0 else "less"
        if self.p < LEVEL:
            return f"{self.ours} gives {more} gold than {self.theirs}"
        return f"{self.ours} perhaps gives {more} gold than {self.theirs} (not clear among so many comparisons)"


def better(results: Results) -> list[str]:
    """Which condition gives more gold than its baseline: policies at equal KL, then best-of-n, then ensembles."""
    found = [_policies_compared(results, f) for f in results.policy_differences]
    rows = [(results.designs[n], f) for n, f in results.findings.items() if f["difference"]]
    for condition, f in sorted(rows, key=lambda row: row[0].rule is not None):
        sizes, p = of_sizes(results, condition), f["difference_p_holm"]
        if condition.rule is None:
            where = f"Best of {f['n']}" + (" (one seed: two models, not two methods)" if f["seeds"] == 1 else "")
            theirs = of_variant(results.designs[f["against"]])
            found.append(Compared(where, of_variant(condition), theirs, sizes, f["difference"], p))
        elif p < LEVEL:
            found.append(Compared(f"Best of {f['n']}", of_variant(condition), "one alone", sizes, f["difference"], p))
    said: dict[tuple[str, str], list[Compared]] = {}
    for one in found:
        said.setdefault((one.where, one.told), []).append(one)
    sentences = [_sentence(where, told, rows) for (where, told), rows in said.items()]
    return sentences[: 2 * MOST] or ["Nothing to compare: one condition, or no baseline."]


def _policies_compared(results: Results, f: dict) -> Compared:
    ours, theirs = (results.designs[results.pooled[f[k]]["condition"]] for k in ("policies", "less"))
    seeds = f"{f['seeds']} seeds" if f["seeds"] == f["seeds_less"] else f"{f['seeds']} against {f['seeds_less']} seeds"
    if f["seeds"] == f["seeds_less"] == 1:
        seeds = "one seed: two policies, not two methods"
    coef = f"KL coefficient {f['kl_coef']:g}" if len(coefficients(results)) > 1 else ""
    how = optimised_by(results)[0]
    if ours == theirs:
        other = f"KL coefficient {results.pooled[f['less']]['kl_coef']:g}"
        sizes = f"{in_words(results, ours.name)}, {f['kl']:.0f} nats"
        return Compared(f"{how} at equal KL ({seeds})", coef, other, sizes, f["at_equal_kl"], f["p_holm"])
    sizes = ", ".join(filter(None, (of_sizes(results, ours), coef, f"{f['kl']:.0f} nats")))
    return Compared(
        f"{how} at equal KL ({seeds})", of_variant(ours), of_variant(theirs), sizes, f["at_equal_kl"], f["p_holm"]
    )


def _sentence(where: str, told: str, rows: Sequence[Compared]) -> str:
    gaps = "; ".join(f"{r.gap} SD" + (f" ({r.sizes})" if r.sizes else "") for r in rows[:MOST])
    more = f"; and {len(rows) - MOST} more" if len(rows) > MOST else ""
    open_ = len(rows) == 1 and not rows[0].gap.excludes_zero
    power = f". Less than {rows[0].gap.half_width:.2f} would not show" if open_ else ""
    return f"{where}: {told}: {gaps}{more}{power}."


def unknown(results: Results, open_: Sequence[Subject], checks: Sequence[Check]) -> list[str]:
    """What the study cannot tell, and what would."""
    said = [f"{s}: {s.facts['verdict'].why}." for s in open_[:SHOWN]]
    if (left := len(open_) - SHOWN) > 0:
        said.append(f"{left} more curve{'s are' if left > 1 else ' is'} not decided: see the table.")
    few = sorted({f["seeds"] for n, f in results.findings.items() if n in results.conditions})
    if few and few[0] < ENOUGH_SEEDS:
        what = "one reward model" if few[0] == 1 else f"{few[0]} reward models"
        said.append(f"Whether other seeds would say the same: best-of-n has {what} a condition.")
    pooled = [f["seeds"] for f in results.pooled.values()]
    if pooled and min(pooled) < ENOUGH_SEEDS:
        what = "is one policy" if min(pooled) == 1 else f"are {min(pooled)} policies"
        short = sum(seeds < ENOUGH_SEEDS for seeds in pooled)
        where = "a condition" if short == len(pooled) else f"in {short} of {len(pooled)} conditions"
        said.append(f"Whether {optimised_by(results)[0]} with other seeds would: there {what} {where}.")
    ends = [f"n = {f['n']}" for f in list(results.findings.values())[:1]]
    if results.policies:
        ends.append(f"a KL of {max(f['kl'] for f in results.policies.values()):.0f} nats of {optimised_by(results)[0]}")
    said.append(f"What happens beyond {' and '.join(ends)}.")
    if not results.golds:
        said.append("Whether another gold would agree: there is one.")
    if failed := [c for c in checks if not c.ok]:
        names = "; ".join(f"{c.name} ({c.detail})" for c in failed)
        said.append(f"Checks that failed: {len(failed)} of {len(checks)}: {names}.")
    return said


def _largest(subjects: Sequence[Subject], key: str) -> list[Subject]:
    return sorted(subjects, key=lambda s: -s.facts[key].mean)[:MOST]


def _range(i: Interval, sign: int = 1) -> str:
    lo, hi = (i.lo, i.hi) if sign > 0 else (-i.hi, -i.lo)
    return f"[{lo:.2f}, {hi:.2f}]"
