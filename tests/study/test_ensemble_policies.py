"""Policies that were trained against an ensemble of a condition's seeds, in the analysis of a study."""

import numpy as np
import pytest

from bon.scores import read_pools
from core.config.load import load
from core.files import read_table
from study import files, matrix
from study.analysis.conditions import Plan
from study.report.build import description
from study.report.style import colour
from study.results import results
from tests.builders.finished_run import policy_stages, shared_stages

STANDARD = (0.5, 2.0)
"""Mean and SD of every reward model under the reference (`tests.builders.finished_run.reward_model`)."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The configuration, its policies, and what the analysis says; study.ensembles does not have the rule."""
    given = load(["configs/smoke.yaml"], [
        f"run.dir={tmp_path_factory.mktemp('runs')}", "run.name=s", "study.variants=[bt]", "study.seeds=3",
        "study.ppo_seeds=2", "study.ppo_variants=[bt]", "study.kl_coefs=[0.0]", "ppo.ensemble=null", "study.sweep=[]",
        "study.ensembles=[mean]", "study.ppo_ensembles=[min]",
    ])  # fmt: skip
    arms, policies = matrix.plan(given)
    cfg = matrix.expanded(given, arms)
    shared_stages(cfg)
    for seed, policy in enumerate(policies):
        policy_stages(cfg.run_dir / "policies" / policy.name, seed)
    pools = read_pools(cfg.run_dir / "bon", [arm.name for arm in arms])
    series = {p.name: files.read_policy(cfg.run_dir, p, pools) for p in policies}
    conditions = {arms[0].condition: [arm.name for arm in arms]}
    plan = Plan(np.arange(1, 17), draws=100, ensembles=("mean",))
    return cfg, arms, policies, results(pools, conditions, series, plan)


def test_its_gain_is_counted_in_the_combination_that_it_optimised(found):
    cfg, _, policies, whole = found
    members = np.stack([(scores - STANDARD[0]) / STANDARD[1] for scores in whole.pools.proxies.values()])
    combined = members.min(axis=0)  # [P, N]
    within = combined - combined.mean(axis=1, keepdims=True)
    unit = np.sqrt((within**2).sum() / (within.size - len(within)))
    policy = next(p for p in policies if p.rule)
    rows = read_table(cfg.run_dir / "policies" / policy.name / "eval" / "rl_eval.parquet")
    mean = dict(zip(whole.pools.prompt_ids, combined.mean(axis=1), strict=True))
    gained = [(r["proxy"] - mean[r["prompt_id"]]) / unit for r in rows if r["step"] == 5]
    assert whole.policies[policy.name]["proxy"].mean == pytest.approx(np.mean(gained))


def test_policies_of_one_ensemble_are_seeds_of_one_condition(found):
    cfg, arms, policies, whole = found
    together = {p.name: whole.policies[p.name] for p in policies if p.rule}
    assert [(f["condition"], f["rule"], f["seed"]) for f in together.values()] == [
        ("bt x 3, min", "min", 0), ("bt x 3, min", "min", 1)
    ]  # fmt: skip
    alone = [whole.policies[p.name] for p in policies if not p.rule]
    assert [(f["condition"], f["rm"], f["rule"], f["seed"]) for f in alone] == [
        ("bt", "bt-seed0", None, 0), ("bt", "bt-seed1", None, 1)
    ]  # fmt: skip
    assert {whole.condition_of(name) for name in whole.policies} == {"bt"}
    assert len({colour(whole, name) for name in whole.policies}) == 1 != colour(whole, "oracle")
    assert "against 2 of them and against ensembles of the seeds (min): 4 policies" in description(cfg, arms, policies)
