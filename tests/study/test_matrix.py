"""The plan of a study: its matrix and its commands."""

import re
from pathlib import Path

import numpy as np
import pytest

from bon.pools import Pools
from core.config.load import load
from core.errors import ArtefactError, ConfigError, DataError
from core.files import write_table
from rm.train import num_layers
from study import matrix
from study import run as study
from study.analysis.conditions import Plan
from study.design import Arm, Condition
from study.report.build import baselines
from study.results import results
from tests.builders.study_plan import ASKED, planned


def test_the_matrix_is_complete_and_seeds_differ_in_nothing_else(tmp_path):
    cfg, arms, policies = planned(tmp_path)
    assert len(arms) == len(cfg.rm.variants) == 2 * 2 * 2 * 3
    assert len(policies) == 2 * 2 * 1 * 2 and {p.condition.variant for p in policies} == {"grm"}
    group = [cfg.rm.variants[f"grm-200pairs-noise0.25-seed{s}"] for s in range(3)]
    assert [v.seed for v in group] == [v.data_seed for v in group] == [0, 1, 2] and {v.pairs for v in group} == {200}
    assert len({v.model_copy(update={"seed": 0, "data_seed": 0}).model_dump_json() for v in group}) == 1
    assert group[0].text_regulariser == "sft" and cfg.rm.variants["bt-100pairs-seed0"].label_noise == 0


@pytest.mark.parametrize("part", ["data", "training", "sampling"])
def test_a_part_of_the_seed_that_does_not_differ_is_that_of_seed_0(tmp_path, part):
    parts = [p for p in ("data", "training", "sampling") if p != part]
    cfg, arms, policies = planned(tmp_path, f"study.seeds_differ_in={parts}", "study.ppo_seeds=3")
    variants = [cfg.rm.variants[arm.name] for arm in arms if arm.condition == arms[0].condition]
    sampling = {load([], matrix.policy_overrides(cfg, p)[3:]).ppo.seed for p in policies}
    seen = {"data": {v.data_seed for v in variants}, "training": {v.seed for v in variants}, "sampling": sampling}
    assert seen.pop(part) == {0} and list(seen.values()) == [{0, 1, 2}] * 2


def test_the_stages_read_back_the_configuration_that_was_planned(tmp_path):
    cfg, _, policies = planned(tmp_path)
    file = study.write_config(cfg, "study.yaml")
    assert load([file]) == cfg
    study.link(cfg, policies)
    study.link(cfg, policies)  # again, as a resumed study does
    (tmp_path / "s" / "rm").mkdir()
    (tmp_path / "s" / "rm" / "manifest.json").write_text("{}")
    for policy in policies:
        own = load([file], matrix.policy_overrides(cfg, policy))
        assert own.ppo.proxy == policy.arms[0].name and own.ppo.kl.coef == policy.kl_coef
        assert (own.run_dir / "rm" / "manifest.json").is_file()
    assert len({load([file], matrix.policy_overrides(cfg, p)).run_dir for p in policies}) == len(policies)


def test_a_second_study_that_starts_meanwhile_disturbs_nothing(tmp_path, monkeypatch):
    """It writes the same file, which a stage of the first one may be reading, and makes the same links."""
    cfg, _, policies = planned(tmp_path)
    file = study.write_config(cfg, "study.yaml")
    with file.open() as stage_reads:
        begin = stage_reads.read(10)
        assert study.write_config(cfg, "study.yaml") == file
        assert begin + stage_reads.read() == file.read_text()
        assert file.stat().st_ino != Path(f"/proc/self/fd/{stage_reads.fileno()}").stat().st_ino
    assert [p.name for p in file.parent.iterdir()] == ["study.yaml"]
    study.link(cfg, policies)
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)  # as it was when the other one had not made it yet
    study.link(cfg, policies)


def test_a_sweep_of_the_kl_coefficient_is_of_one_reward_model(tmp_path):
    _, _, without = planned(tmp_path, "study.ppo_seeds=2")
    coefs = [without[0].kl_coef + 0.5, without[0].kl_coef + 1]
    _, _, policies = planned(tmp_path, "study.ppo_seeds=2", f"study.kl_sweep={coefs}")
    more = [policy for policy in policies if policy not in without]
    assert [policy.kl_coef for policy in more] == coefs and {p.arms for p in more} == {without[0].arms}
    _, _, again = planned(tmp_path, "study.ppo_seeds=2", f"study.kl_sweep=[{without[0].kl_coef}]")
    assert again == without
    with pytest.raises(ConfigError, match=r"study\.kl_sweep needs study\.ppo_variants"):
        planned(tmp_path, "study.ppo_variants=[]", "study.kl_sweep=[1.5]")


def test_commands_of_a_scheduler(tmp_path):
    cfg, _, policies = planned(tmp_path)
    shared, arms, last = "\n".join(study.commands(Path("s.yaml"), policies, cfg, Path("m.yaml"))).split("\n\n")
    assert shared.splitlines() == [f"grm {s} --config s.yaml" for s in ("prompts", "preferences", "rm", "bon")]
    assert len(arms.splitlines()) == len(policies) and last == "grm study --config m.yaml"
    assert re.fullmatch(r"grm ppo --config s.yaml run.name=\S+ .* && grm eval --config .*", arms.splitlines()[0])


def test_the_last_command_makes_the_plan_of_the_first(tmp_path, capsys):
    """It reads the matrix as it was given: the expanded file has arms where the matrix has variants."""
    options = ["--config", "configs/offline.yaml", f"run.dir={tmp_path}", *ASKED]
    assert study.main(["--commands", *options]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert last[:3] == ["grm", "study", "--config"]
    assert study.main(["--dry-run", "--config", last[3]]) == 0
    assert "24 reward models, 8 policies" in capsys.readouterr().out


def test_a_dry_run_counts(tmp_path, capsys):
    assert study.main(["--dry-run", "--config", "configs/offline.yaml", f"run.dir={tmp_path}", *ASKED]) == 0
    said = capsys.readouterr().out
    assert "8 conditions x 3 seeds = 24 reward models, 8 policies" in said and not list(tmp_path.iterdir())


def test_sizes_are_an_axis_of_the_matrix(tmp_path):
    """Each size is a reward model of that many layers; policies can be trained against some of them."""
    cfg, arms, policies = planned(tmp_path, "study.layers=[6, 12]", "study.ppo_layers=[12]")
    assert len(arms) == 2 * 2 * 2 * 2 * 3 and {p.condition.layers for p in policies} == {12}
    variants = cfg.rm.variants
    assert variants["grm-100pairs-6layers-noise0.25-seed2"].num_layers == 6
    assert num_layers(cfg.rm, variants["bt-100pairs-12layers-seed0"]) == 12
    assert {p.name for p in policies} >= {"grm-200pairs-12layers-noise0.25-seed0-kl0.1"}
    own, _, _ = planned(tmp_path, "rm.num_layers=9", "rm.variants={bt: {num_layers: 5}, grm: {}}")
    assert [num_layers(own.rm, own.rm.variants[f"{m}-100pairs-seed0"]) for m in ("bt", "grm")] == [5, 9]


def test_arms_are_compared_with_the_first_variant_of_their_size(tmp_path):
    _, arms, _ = planned(tmp_path, "study.layers=[6, 12]")
    base = baselines(arms)
    assert base[Condition("grm", 100, 6, 0.25)] == Condition("bt", 100, 6, 0.25)
    assert base[Condition("bt", 200, 12, 0.0)] == Condition("bt", 200, 12, 0.0)


@pytest.mark.parametrize(
    "condition",
    [
        Condition("grm", 96, None, 1e-5),  # a noise that is written with an exponent
        Condition("grm-5layers"),  # a variant whose name looks like a size
        Condition("a-5layers x 2, mean-seed3", 96, 4, 0.25),
    ],
)
def test_what_an_arm_is_never_comes_from_its_name(condition):
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(24, 16))
    arms = [Arm(condition, seed) for seed in range(2)]
    table = Pools(tuple(f"p{i}" for i in range(24)), gold, {a.name: gold + rng.normal(size=gold.shape) for a in arms})
    plan = Plan(np.arange(1, 17), draws=100, ensembles=("mean",))
    found = results(table, {condition: [a.name for a in arms]}, {}, plan)
    assert set(found.findings) == {condition.name, condition.ensemble("mean", 2).name}
    for name, facts in found.findings.items():
        cell = (facts["variant"], facts["pairs"], facts["layers"], facts["label_noise"])
        assert cell == (condition.variant, condition.pairs, condition.layers, condition.label_noise)
        assert facts["rule"] == (None if name == condition.name else "mean")
        assert found.condition_of(name) == condition.name


def test_two_conditions_of_one_name_are_refused():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(24, 16))
    table = Pools(tuple(f"p{i}" for i in range(24)), gold, {k: gold + rng.normal(size=gold.shape) for k in "ab"})
    conditions = {Condition("grm-5layers"): ["a"], Condition("grm", layers=5): ["b"]}
    with pytest.raises(ArtefactError, match="two conditions have the name grm-5layers: rename"):
        results(table, conditions, {}, Plan(np.arange(1, 17), draws=100))


def test_two_arms_of_one_name_are_refused(tmp_path):
    variants = "rm.variants={a: {}, a-noise0.25: {}}"
    with pytest.raises(ConfigError, match="have the name of another"):
        planned(tmp_path, variants, "ppo.proxy=a", "study.variants=[a, a-noise0.25]", "study.ppo_variants=[]",
                "study.pairs=[]")  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["study.layers=[6, 6]"], "layers .6, 6. has an entry twice"),
        (["study.layers=[6]", "study.ppo_layers=[12]"], r"ppo_layers \[12\] are none of study.layers \[6\]"),
        (["study.layers=[6, 12]", "rm.trainable_layers=8"], "rm.trainable_layers 8 exceeds 6 layers"),
        (["study.layers=[6]", "rm.variants={bt: {}, grm: {trainable_layers: 7}}"],
         "rm.variants.grm.trainable_layers 7 exceeds 6 layers"),
        (["study.layers=[6]", "rm.lora={top_layers: 8}"], "rm.lora.top_layers 8 exceeds 6 layers"),
        (["study.layers=[4, 12]", "ppo.critic_trainable_layers=8"],
         "ppo.critic_trainable_layers 8 exceeds 4 layers of the proxy that the critic starts from"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_reported_before_anything_runs(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, *more)


def test_a_critic_of_the_policy_and_sizes_without_policies_do_fit(tmp_path):
    planned(tmp_path, "study.layers=[4, 12]", "ppo.critic_trainable_layers=8", "ppo.critic_init=policy")
    planned(tmp_path, "study.layers=[4, 12]", "ppo.critic_trainable_layers=8", "study.ppo_layers=[12]")


def test_more_layers_than_the_base_has_are_reported_before_anything_runs(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"num_hidden_layers": 10}')
    with pytest.raises(ConfigError, match="12 layers exceed the 10 of"):
        planned(tmp_path, "study.layers=[6, 12]", f"rm.base.path={tmp_path / 'base'}")


def test_methods_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no rm.variants other; there are grm, bt"):
        planned(tmp_path, "study.variants=[bt, other]")
    with pytest.raises(ConfigError, match="ppo_variants grm are none of study.variants bt"):
        planned(tmp_path, "study.variants=[bt]")


def test_a_study_that_trains_on_its_evaluation_prompts_is_refused(tmp_path):
    cfg, _, _ = planned(tmp_path)
    for stage in ("prompts", "preferences"):
        (cfg.run_dir / stage).mkdir(parents=True)
    splits = {"a": "rm_train", "b": "eval", "c": "eval"}
    write_table(cfg.run_dir / "prompts" / "prompts.parquet", [{"prompt_id": i, "split": s} for i, s in splits.items()])
    pairs = cfg.run_dir / "preferences" / "pairs.parquet"
    write_table(pairs, [{"prompt_id": "a"}])
    study.refuse_leaks(cfg)
    write_table(pairs, [{"prompt_id": "a"}, {"prompt_id": "c"}])
    with pytest.raises(ConfigError, match="train on 1 of its 2 evaluation prompts .first c.: leave them out"):
        study.refuse_leaks(cfg)


@pytest.mark.parametrize("axis", ["ensembles", "sweep", "ppo_ensembles"])
def test_combiners_that_are_not_known_are_reported_before_anything_runs(tmp_path, axis):
    with pytest.raises(DataError, match="no combiner 'mode'"):
        planned(tmp_path, f"study.{axis}=[mean, mode]")


ENSEMBLES = ["study.ppo_ensembles=[mean, 'uwo:0.1']", "study.ppo_label_noise=[0.25]"]


def test_policies_against_ensembles_of_the_seeds(tmp_path):
    """One a condition, rule, PPO seed and KL coefficient; all seeds of the condition are members."""
    cfg, arms, policies = planned(tmp_path, *ENSEMBLES, "study.ppo_seeds=2")
    alone, together = ([p for p in policies if bool(p.rule) == combined] for combined in (False, True))
    assert len(alone) == 2 * 2 * 2 and len(together) == 2 * 2 * 2 * 2  # sizes x (rules x) seeds x KL coefficients
    assert len({p.name for p in policies}) == len(policies)
    for policy in together:
        own = load([study.write_config(cfg, "study.yaml")], matrix.policy_overrides(cfg, policy))
        of_condition = [arm.name for arm in arms if arm.condition == policy.condition.members]
        assert own.ppo.members == tuple(of_condition) and len(of_condition) == 3
        assert (own.ppo.proxy, own.ppo.combine) == (of_condition[0], policy.rule)
        assert own.ppo.seed == policy.seed and own.ppo.kl.coef == policy.kl_coef
    conditions = {(p.condition.pairs, p.rule) for p in together}
    assert conditions == {(size, rule) for size in (100, 200) for rule in ("mean", "uwo:0.1")}
    first = next(p for p in together if p.rule == "uwo:0.1")
    assert first.name == "grm-100pairs-noise0.25-x3-uwo0.1-seed0-kl0" and first.condition.combined == 3


def test_ensembles_of_some_variants_alone(tmp_path):
    _, _, both = planned(tmp_path, *ENSEMBLES, "study.ppo_variants=[bt, grm]")
    _, _, one = planned(tmp_path, *ENSEMBLES, "study.ppo_variants=[bt, grm]", "study.ppo_ensemble_variants=[grm]")
    of = lambda policies: {(p.condition.variant, bool(p.rule)) for p in policies}  # noqa: E731
    assert of(both) - of(one) == {("bt", True)} and of(one) == {("bt", False), ("grm", False), ("grm", True)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([*ENSEMBLES, "study.seeds=1"], "set study.seeds to 2 or more"),
        ([*ENSEMBLES, "study.ppo_seeds=2", "study.seeds_differ_in=[data, training]"], "differ in their sampling alone"),
        (["ppo.ensemble={members: [grm, bt]}"], "from study.ppo_ensembles"),
        (["study.ppo_ensembles=[mean, mean]"], "ppo_ensembles .* has an entry twice"),
        ([*ENSEMBLES, "study.ppo_ensemble_variants=[bt]"], "ppo_ensemble_variants bt are none of .*ppo_variants grm"),
    ],
)
def test_ensembles_that_cannot_be_trained_against(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, *more)
