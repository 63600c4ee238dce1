"""The plan of a study: its matrix, its commands, and the data of each arm."""

import re
from pathlib import Path

import numpy as np
import pytest

from bon.bootstrap import crossed_draws, student_quantile
from pipelines import study
from pipelines.config import RewardVariant
from pipelines.load import ConfigError, load
from rm.train import arm_rows

ASKED = [
    "study.methods=[bt, grm]", "study.seeds=3", "study.pairs=[100, 200]", "study.label_noise=[0, 0.25]",
    "study.ppo_methods=[grm]", "study.kl_coefs=[0.0, 0.1]",
]  # fmt: skip


def planned(tmp_path, *more):
    cfg = load([], [f"run.dir={tmp_path}", "run.name=s", *ASKED, *more])
    arms, policies = study.plan(cfg)
    return study.expanded(cfg, arms), arms, policies


def test_the_matrix_is_complete_and_seeds_differ_in_nothing_else(tmp_path):
    cfg, arms, policies = planned(tmp_path)
    assert len(arms) == len(cfg.rm.variants) == 2 * 2 * 2 * 3
    assert len(policies) == 2 * 2 * 1 * 2 and {p.arm.method for p in policies} == {"grm"}
    group = [cfg.rm.variants[f"grm-200pairs-noise0.25-seed{s}"] for s in range(3)]
    assert [v.seed for v in group] == [0, 1, 2] and {v.pairs for v in group} == {200}
    assert len({v.model_copy(update={"seed": 0}).model_dump_json() for v in group}) == 1
    assert group[0].text_regulariser == "sft" and cfg.rm.variants["bt-100pairs-seed0"].label_noise == 0


def test_the_stages_read_back_the_configuration_that_was_planned(tmp_path):
    cfg, _, policies = planned(tmp_path)
    file = study.write_config(cfg)
    assert load([file]) == cfg
    study.link(cfg, policies)
    study.link(cfg, policies)  # again, as a resumed study does
    (tmp_path / "s" / "rm").mkdir()
    (tmp_path / "s" / "rm" / "manifest.json").write_text("{}")
    for policy in policies:
        own = load([file], study.policy_overrides(cfg, policy))
        assert own.ppo.proxy == policy.arm.name and own.ppo.kl.coef == policy.kl_coef
        assert (own.run_dir / "rm" / "manifest.json").is_file()
    assert len({load([file], study.policy_overrides(cfg, p)).run_dir for p in policies}) == len(policies)


def test_commands_of_a_scheduler(tmp_path):
    cfg, _, policies = planned(tmp_path)
    shared, arms, last = "\n".join(study.commands(Path("s.yaml"), policies, cfg)).split("\n\n")
    assert shared.splitlines() == [f"grm {s} --config s.yaml" for s in ("prompts", "preferences", "rm", "bon")]
    assert len(arms.splitlines()) == len(policies) and last == "grm study --config s.yaml"
    assert re.fullmatch(r"grm ppo --config s.yaml run.name=\S+ .* && grm eval --config .*", arms.splitlines()[0])


def test_a_dry_run_counts(tmp_path, capsys):
    assert study.main(["--dry-run", "--config", "configs/offline.yaml", f"run.dir={tmp_path}", *ASKED]) == 0
    said = capsys.readouterr().out
    assert "8 conditions x 3 seeds = 24 reward models, 8 policies" in said and not list(tmp_path.iterdir())


def test_methods_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no rm.variants other; there are grm, bt"):
        planned(tmp_path, "study.methods=[bt, other]")
    with pytest.raises(ConfigError, match="ppo_methods grm are none of study.methods bt"):
        planned(tmp_path, "study.methods=[bt]")


def test_arms_of_one_size_share_their_wrong_labels():
    rows = [
        {"prompt_id": str(i), "chosen": "a", "rejected": "b", "flipped": i == 0, "pair_id": str(i),
         "weight": 1.0, "gold_chosen": 1.0, "gold_rejected": 0.0} for i in range(200)
    ]  # fmt: skip
    arms = [RewardVariant(pairs=100, label_noise=0.25, seed=s) for s in (0, 1)]
    first, second = (arm_rows(rows, arm, 1) for arm in arms)
    assert first == second and len(first) == 100
    changed = np.array([a["chosen"] != b["chosen"] for a, b in zip(first, rows, strict=False)])
    assert changed.sum() == 25
    assert all(a["flipped"] == (b["flipped"] != c) for a, b, c in zip(first, rows, changed, strict=False))
    assert arm_rows(rows, RewardVariant(), 1) == rows
    with pytest.raises(Exception, match="asks for 300 training pairs; there are 200"):
        arm_rows(rows, RewardVariant(pairs=300), 1)


def test_the_crossed_bootstrap_covers_seeds_and_prompts():
    """Its spread is that of a mean over both: sqrt(var_seed / S + var_prompt / P) where effects add up."""
    rng = np.random.default_rng(0)
    seeds, prompts = rng.normal(size=(8, 1, 1)), 3 * rng.normal(size=(1, 90, 1))
    draws = crossed_draws(seeds + prompts, 4000, 1)
    lo, hi = np.quantile(draws, [0.025, 0.975], axis=0)
    parts = seeds.var(ddof=1) / 8, prompts.var(ddof=1) / 90
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 7 + parts[1] ** 2 / 89)
    expected = student_quantile(0.975, freedom) * np.sqrt(sum(parts))
    assert draws.mean() == pytest.approx(seeds.mean() + prompts.mean(), abs=0.05)
    assert (hi - lo)[0] / 2 == pytest.approx(expected, rel=0.08)
    low, high = np.quantile(crossed_draws(seeds[:1] + prompts, 4000, 1), [0.025, 0.975], axis=0)
    assert (high - low)[0] / 2 == pytest.approx(1.96 * prompts.std() / np.sqrt(90), rel=0.08)


def test_copies_of_a_weighted_pair_keep_one_label():
    rows = [{"pair_id": str(i), "chosen": "a", "rejected": "b", "flipped": False, "gold_chosen": None,
             "gold_rejected": None, "weight": 2.0} for i in range(100)]  # fmt: skip
    found = arm_rows(rows, RewardVariant(pairs=50, label_noise=0.2), 1)
    assert len(found) == 100 and len({r["pair_id"] for r in found}) == 50
    assert len({(r["pair_id"], r["flipped"]) for r in found}) == 50 and sum(r["flipped"] for r in found) == 20
