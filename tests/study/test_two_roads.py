"""`grm report` of a finished run and `grm study` of the same stages write the same numbers, each by its own road."""

import csv
import json

import numpy as np
import pytest

from bon.gains import scale
from bon.scores import read_pools
from core.config.load import load
from core.files import read_table
from study import matrix
from study import run as study
from study.report import build, of_run
from tests.builders.finished_run import policy_stages, shared_stages

pytestmark = pytest.mark.slow

INPUTS = ("preferences", "rm", "bon", "ppo", "eval")
NAMES = {"bt-seed0": "bt", "grm-seed0": "grm", "PPO against bt-seed0": "bt-seed0-kl0"}
"""What the run calls its conditions and its policy -> what the study calls them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two reward models and a policy, and the folder of its results and of the policy's own report."""
    root = tmp_path_factory.mktemp("runs")
    given = load(["configs/smoke.yaml"], [
        f"run.dir={root}", "run.name=s", "study.variants=[bt, grm]", "study.seeds=1", "study.ppo_variants=[bt]",
        "study.kl_coefs=[0.0]", "ppo.ensemble=null", "bon.samples=32", "bon.prompts=30", "study.sweep=[]",
        f"rm.base.path={root}/s/rm/bt-seed0",
    ])  # fmt: skip
    arms, policies = matrix.plan(given)
    cfg = matrix.expanded(given, arms)
    shared_stages(cfg)
    study.link(cfg, policies)
    policy_stages(cfg.run_dir / "policies" / policies[0].name)
    build.report(cfg, arms, policies)
    own = load([study.write_config(cfg, "study.yaml")], matrix.policy_overrides(cfg, policies[0]))
    return own, cfg.run_dir / "study", reported(own)


def reported(cfg):
    out = cfg.run_dir / "report"
    out.mkdir()
    of_run.run(cfg, {i: cfg.run_dir / i for i in INPUTS}, out)
    return out


def read(folder, name):
    return json.loads((folder / name).read_text())


def nameless(facts):
    return {
        k: v for k, v in facts.items() if k not in ("variant", "condition", "label_noise", "against", "seed", "members")
    }


def test_a_run_and_a_study_give_the_same_numbers(finished):
    _, study_folder, report = finished
    for file in ("conditions.json", "policies.json"):
        own, whole = read(report, file), read(study_folder, file)
        assert {NAMES[name] for name in own} == whole.keys()
        for name, facts in own.items():
            assert nameless(facts) == nameless(whole[NAMES[name]]), name
    assert read(report, "conditions.json")["grm-seed0"]["difference"] is not None
    assert read(report, "policies.json")["PPO against bt-seed0"]["verdict"]["kind"] == "over-optimised"
    own, whole = ({c["name"]: c["ok"] for c in read(f, "checks.json")} for f in (report, study_folder))
    assert own == whole
    own, whole = (curves(folder) for folder in (report, study_folder))
    assert len(own) > 400 and all(whole[NAMES.get(rm, rm), *rest] == numbers for (rm, *rest), numbers in own.items())


def curves(folder):
    rows = csv.DictReader((folder / "curves.csv").open())
    return {(r["rm"], r["method"], r["metric"], r["x"]): (r["mean"], r["lo"], r["hi"], r["d"]) for r in rows}


def test_samples_and_card_have_the_numbers_of_the_tables(finished):
    """Gains over the pool of the same prompt, in SD within prompts, not over what the reference scored elsewhere."""
    cfg, _, report = finished
    pools = read_pools(cfg.run_dir / "bon", ["bt-seed0"])
    rows = read_table(cfg.run_dir / "eval" / "rl_eval.parquet")
    last = {r["prompt_id"]: r for r in rows if r["step"] == 5}
    facts = read(report, "policies.json")["PPO against bt-seed0"]
    series = of_run.run_series(cfg, cfg.run_dir / "eval")
    shown = {s["prompt"].split()[1]: s["after"] for s in of_run.before_and_after(series, pools, "bt-seed0", seed=0)}
    assert len(shown) == 20
    for name, table in (("gold", pools.gold), ("proxy", pools.proxies["bt-seed0"])):
        mean = dict(zip(pools.prompt_ids, table.mean(axis=1), strict=True))
        gained = {p: (r[name] - mean[p]) / scale(table) for p, r in last.items()}
        assert facts[name]["mean"] == pytest.approx(np.mean(list(gained.values())))
        assert f"{facts[name]['mean']:+.2f}" in (report / "policy-card.md").read_text()
        assert all(side[name] == f"{gained[p]:+.2f}" for p, side in shown.items())
