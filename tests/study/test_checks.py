"""Every check of a study passes on sound input and fails on input that is broken on purpose."""

from dataclasses import replace

import numpy as np
import pytest

from bon.gains import scale
from bon.pools import Pools
from core.config.load import load
from study import checks as check
from study.design import Condition
from study.other_tools import by_seed
from study.records import Series
from study.report.build import remarks
from study.results import results
from tests.builders.planted import PLAN, pools, series


def chat(text):
    return [{"role": "user", "content": text}]


PROMPTS = [
    {"prompt_id": "e1", "split": "eval", "prompt": chat("Why do cats purr when they are held by people at home?")},
    {"prompt_id": "e2", "split": "eval", "prompt": chat("Name a fruit.")},
    {"prompt_id": "t1", "split": "rm_train", "prompt": chat("Write a poem about the sea.")},
    {"prompt_id": "near", "split": "rl_train",
     "prompt": chat("Why do cats purr when they are held by people at home, now?")},
    {"prompt_id": "same", "split": "rl_train", "prompt": chat("  name a fruit.")},
]  # fmt: skip


@pytest.mark.parametrize(("trained", "ok"), [(["t1"], True), (["e1"], False), (["near"], False), (["same"], False)])
def test_leakage(trained, ok):
    found = check.leakage(PROMPTS, ["e1", "e2"], trained)
    assert found.ok is ok, found


def test_gold_in_training():
    clean = {"ppo": {"config": {"ppo": {}, "run.seed": 1}, "inputs": {"prompts": "x", "policy.path=models/a": "y"}}}
    assert check.gold_untouched(clean).ok
    for broken in ({"config": {"gold": {}}, "inputs": {}}, {"config": {}, "inputs": {"gold.path=models/g": "z"}}):
        assert not check.gold_untouched({**clean, "other": broken}).ok


@pytest.fixture(scope="module")
def sound():
    table = pools()
    return results(table, by_seed(list(table.proxies)), {}, PLAN)


@pytest.mark.slow
def test_proxies_that_were_shuffled(sound):
    assert check.aligned(sound).ok
    table = sound.pools
    shuffled = np.random.default_rng(1).permuted(table.proxies["bt-seed1"], axis=1)
    broken = replace(table, proxies={**table.proxies, "bt-seed1": shuffled})
    found = check.aligned(results(broken, by_seed(list(broken.proxies)), {}, PLAN))
    assert not found.ok and "bt-seed1" in found.detail and "bt-seed0" not in found.detail


def test_gold_that_is_length(sound):
    assert check.length_confound(sound.pools, sound).ok
    long = replace(sound.pools, gold=sound.pools.length + 0.1 * sound.pools.gold)
    assert not check.length_confound(long, results(long, by_seed(list(long.proxies)), {}, PLAN)).ok


def test_policies_that_gold_scores_otherwise_than_pools():
    rows = series(bend=0.2, P=40)
    ids = tuple(sorted({r["prompt_id"] for r in rows}))
    first = np.array([r["gold"] for r in rows if r["step"] == 0])
    rng = np.random.default_rng(0)
    table = Pools(ids, first[:, None] + 0.5 * rng.normal(size=(40, 32)), {"bt": rng.normal(size=(40, 32))})
    of = lambda rows: results(table, {Condition("bt"): ["bt"]}, {"run": Series(rows, "bt")}, PLAN)  # noqa: E731
    assert check.same_scoring(of(rows)).ok
    moved = [r | {"gold": r["gold"] - 1.0} for r in rows]  # as if gold saw another template
    assert not check.same_scoring(of(moved)).ok


def test_policies_of_another_distribution_than_the_pools_start_from_their_own_first_step():
    """Pools at a low temperature score 2 higher here; nothing of that may be taken for a gain or a loss of PPO."""
    rows = series(bend=0.2, P=40)
    ids = tuple(sorted({r["prompt_id"] for r in rows}))
    rng = np.random.default_rng(0)
    first, last = (np.array([r["gold"] for r in rows if r["step"] == step]) for step in (0, 11))
    table = Pools(ids, first[:, None] + 2 + 0.5 * rng.normal(size=(40, 32)), {"bt": rng.normal(size=(40, 32))})
    of = lambda table: results(table, {Condition("bt"): ["bt"]}, {"run": Series(rows, "bt")}, PLAN)  # noqa: E731
    shared, apart = of(table), of(replace(table, of_reference=False))
    change = (last - first).mean() / scale(table.gold)
    assert apart.policies["run"]["gold"].mean == pytest.approx(change)
    assert shared.policies["run"]["gold"].mean < change - 2  # what sound pools would be wrong about
    assert not check.same_scoring(shared).ok and "not comparable" in check.same_scoring(apart).detail


@pytest.mark.parametrize(
    ("options", "ok"),
    [
        ([], True), (["generation.temperature=0.7"], True), (["bon.temperature=1"], True),
        (["bon.temperature=0.7"], False), (["bon.top_p=0.95"], False),
        (["bon.temperature=0.7", "generation.temperature=0.7"], True),
    ],
)  # fmt: skip
def test_pools_and_policies_of_one_distribution(options, ok):
    cfg = load([], options)
    found = check.one_reference(cfg)
    assert (found.ok, cfg.one_reference, not remarks(cfg)) == (ok, ok, ok)
    if options == ["bon.top_p=0.95"]:
        assert found.detail.startswith("pools have temperature 1 and top-p 0.95, policies temperature 1, all tokens")
    apart = load([], [*options, "data.eval_prompts=data/others.jsonl"])
    assert remarks(apart).startswith(" Evaluated on the prompts of others.jsonl, not of prompts.jsonl.")


def test_estimates_of_kl():
    rng = np.random.default_rng(0)
    rows = [{"step": s, "kl_rb": 2.0, "kl_k1": 2.0 + rng.normal()} for s in (1, 2) for _ in range(100)]
    assert check.kl_estimates({"run": Series(rows)}).ok
    assert not check.kl_estimates({"run": Series([r | {"kl_k1": -r["kl_k1"]} for r in rows])}).ok


@pytest.mark.slow
def test_repeated_responses(sound):
    assert check.bound_is_close(sound).ok
    tied = {name: np.round(values / 2) for name, values in sound.pools.proxies.items()}
    broken = replace(sound.pools, proxies=tied)
    assert not check.bound_is_close(results(broken, by_seed(list(tied)), {}, PLAN)).ok


def test_enough(sound):
    by_name = {c.name: c.ok for c in check.enough(sound, {"run": Series([])}, 1)}
    assert by_name == {"at least 3 reward models a condition": True, "at least 500 prompts": False,
                       "at least 3 policies a condition": False}  # fmt: skip
    few = results(sound.pools, {Condition("bt"): ["bt-seed0"]}, {}, PLAN)
    assert not check.enough(few, {}, 0)[0].ok


def test_label_noise():
    assert check.label_noise({"a": 0.25}, {"a": 0.25}, 0).ok
    assert not check.label_noise({"a": 0.25}, {"a": 0.20}, 0).ok
    assert not check.label_noise({"a": 0.25}, {"a": 0.25}, 3).ok


def test_relatives_responses_and_cost():
    assert check.gold_lineage("judge", None, "m").ok and check.gold_lineage("checkpoint", "other", "m").ok
    assert not check.gold_lineage("checkpoint", "m", "m").ok and not check.gold_lineage("hub", None, "m").ok
    good = [{"prompt_id": str(i), "response": f"r{i}", "finished": True} for i in range(50)]
    assert all(c.ok for c in check.degenerate(good, "x"))
    for broken in ({"finished": False}, {"response": " "}):
        assert not all(c.ok for c in check.degenerate([r | broken for r in good], "x"))
    assert not all(c.ok for c in check.degenerate([r | {"prompt_id": "0", "response": "a"} for r in good], "x"))
    assert check.equal_cost({"a": 10, "b": 10}).ok and not check.equal_cost({"a": 10, "b": 50}).ok
    planned = check.equal_cost({"a": 10, "b": 10}, [1, 8])
    assert planned.ok and planned.detail == "pairs seen: 10; in 1 or 8 epochs, as rm.variants say"
