"""What a stage depends on, and finished runs of an earlier version."""

import json

import pytest

from core.artefacts import Fingerprint
from core.config import Config, Gold
from core.config.load import load
from core.errors import ArtefactError, ConfigError, DataError
from core.files import path_digest
from pipelines import stages
from pipelines.stages import STAGES, Correction, Stage, fingerprint, plain_values
from tests.builders.processes import ROOT

EARLIER = json.loads((ROOT / "tests" / "builders" / "configurations-0.1.json").read_text())
"""Stage -> `config` of the manifest that version 0.1 wrote for configs/smoke.yaml on CPUs without bfloat16."""


def sections(stage: Stage, *overrides: str) -> Fingerprint:
    """What the stage reads of configs/smoke.yaml, without the digests of its inputs."""
    types = ["engine.dtype=float32", "generation.vllm.dtype=float32", "engine.processes=2"]
    plain = plain_values(stage, load([ROOT / "configs" / "smoke.yaml"], [*types, *overrides]))

    def read(field: str):
        value = plain
        for key in field.split("."):
            value = value[key]
        return value

    return Fingerprint({field: read(field) for field in stage.reads})


@pytest.mark.parametrize("name", EARLIER)
def test_a_run_of_an_earlier_version_stays_up_to_date(name):
    """Whoever renames a field, changes a default or a shipped configuration makes finished runs stale: on purpose?

    Results that were wrong are out of date by `Stage.corrections`, with the reason.
    """
    earlier = {"config": EARLIER[name]}
    assert sections(STAGES[name]).differences(earlier) == []
    changed = sections(STAGES[name], "run.seed=7").differences(earlier)
    assert changed == ["run.seed: 1 -> 7"]


def test_a_run_that_is_moved_stays_up_to_date(tmp_path):
    report = STAGES["report"]
    then = {"config": sections(report, "run.dir=runs").sections}
    assert sections(report, f"run.dir={tmp_path}").differences(then) == []
    assert sections(report, "run.name=other").differences(then) == ["run.name: 'smoke' -> 'other'"]


def test_gold_that_is_not_trained_yet_is_named(tmp_path):
    stage = Stage("label", "module", (), (), ("gold.path",))
    cfg = Config(gold=Gold(kind="checkpoint", path=str(tmp_path / "runs" / "gold" / "rm" / "gold")))
    with pytest.raises(ArtefactError, match="a run of its own: `make rm CONFIG"):
        fingerprint(stage, cfg)


def test_a_correction_concerns_only_the_results_that_were_wrong(tmp_path):
    """Imported pairs were read wrongly once; sampled ones were not, and stay up to date."""
    faults = lambda *overrides: fingerprint(  # noqa: E731
        Stage("label", "module", (), ("preferences",), corrections=(Correction("erred", of="preferences.sources"),)),
        load([ROOT / "configs" / "smoke.yaml"], [*overrides]),
    ).differences({"config": {}, "inputs": {}})
    assert "an earlier version erred" not in faults()
    assert faults("preferences.sources.hh.path=data/prompts.jsonl")[0] == "an earlier version erred"


def test_a_mended_head_makes_runs_with_that_head_out_of_date_and_no_others():
    stage = Stage("rm", "module", (), ("rm",), corrections=STAGES["rm"].corrections)

    def changed(head: str) -> list[str]:
        found = fingerprint(stage, load([], [f"rm.variants={{grm: {{head: {head}}}}}"]))
        return [line for line in found.differences({}) if "earlier version" in line]

    assert changed("mlp") == changed("linear") == []
    assert "InfoRM's KL" in changed("inform")[0] and "ODIN's correlations" in changed("odin")[0]


def test_a_template_of_ones_own_is_an_input(policy_path, tmp_path):
    """Another content of the file makes the stages run again; one of TRL's templates is no file."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    own = tmp_path / "own.jinja"

    def inputs(template: str) -> dict[str, str]:
        sections = {"policy": {"path": str(policy_path), "chat_template": template}}
        cfg = Config.model_validate(sections | {"data": {"prompts": tmp_path / "prompts.jsonl"}})
        return fingerprint(STAGES["prompts"], cfg).inputs

    own.write_text("{{ messages[0].content }}")
    first = inputs(str(own))
    assert first[f"policy.chat_template={own}"] == path_digest(own)
    assert len(inputs("qwen3_training")) == len(first) - 1
    with pytest.raises(DataError, match="is neither a file nor one of TRL's templates"):
        inputs(str(tmp_path / "missing.jinja"))


def test_another_engine_of_ppo_leaves_reward_models_up_to_date():
    """And the other way round; where a value comes from does not matter, and eval reads PPO's."""
    plain = {name: {"config": sections(STAGES[name]).sections} for name in ("rm", "ppo", "eval")}

    def changed(*overrides: str) -> dict[str, list[str]]:
        return {name: sections(STAGES[name], *overrides).differences(old) for name, old in plain.items()}

    of_ppo = ["engine.zero_stage: 3 -> 2"]
    assert changed("ppo.engine.zero_stage=2") == {"rm": [], "ppo": of_ppo, "eval": []}
    assert changed("rm.engine.zero_stage=2") == {"rm": of_ppo, "ppo": [], "eval": []}
    assert changed("engine.zero_stage=2") == {"rm": of_ppo, "ppo": of_ppo, "eval": []}
    same = dict.fromkeys(plain, [])
    assert changed("ppo.engine={zero_stage: 3, dtype: float32}", "rm.engine.processes=2") == same
    assert changed("engine.zero_stage=2", "rm.engine.zero_stage=3", "ppo.engine.zero_stage=3") == same
    head = ["engine.float32_head: True -> False"]
    assert changed("ppo.engine.float32_head=false") == {"rm": [], "ppo": head, "eval": head}


def test_manifests_say_whether_the_code_of_a_model_was_run():
    """Every stage that loads the policy or the base of reward models; a change makes its result out of date."""
    for name, field in {"prompts": "policy", "preferences": "policy", "rm": "rm.base", "bon": "policy", "ppo": "policy",
                        "eval": "policy"}.items():  # fmt: skip
        changed = sections(STAGES[name], f"{field}.trust_remote_code=true").differences(
            {"config": sections(STAGES[name]).sections}
        )
        assert changed == [f"{field}.trust_remote_code: False -> True"], name


def test_the_source_of_an_own_reward_is_an_input(tmp_path, monkeypatch):
    """Its digest is in the manifest, so that another function under the same name makes PPO run again."""
    monkeypatch.chdir(tmp_path)
    stage = Stage("ppo", "module", (), ("ppo",), functions=STAGES["ppo"].functions)
    cfg = Config.model_validate({"ppo": {"reward": {"function": "own_reward:f"}}})
    with pytest.raises(ConfigError, match=r"ppo\.reward\.function: no module 'own_reward'"):
        fingerprint(stage, cfg)
    (tmp_path / "own_reward.py").write_text("def f(prompts, responses, metadata):\n    return [0.0] * len(prompts)\n")
    before = fingerprint(stage, cfg)
    assert before.inputs == {"ppo.reward.function=own_reward:f": path_digest(tmp_path / "own_reward.py")}
    (tmp_path / "own_reward.py").write_text("def f(prompts, responses, metadata):\n    return [1.0] * len(prompts)\n")
    monkeypatch.setattr(stages, "_digests", {})  # of a process that began before the change
    assert fingerprint(stage, cfg).differences({"config": before.sections, "inputs": before.inputs}) == [
        "input ppo.reward.function=own_reward:f changed"
    ]
    assert fingerprint(stage, Config()).inputs == {}


def test_gold_is_an_input_of_ppo_only_where_it_is_watched(tmp_path):
    """So that finished runs do not depend on a gold that they never read."""
    stage, text = Stage("ppo", "module", (), ("ppo",), with_gold="ppo.watch_gold"), tmp_path / "gold"
    text.mkdir()
    for watched in (True, False):
        cfg = Config.model_validate({
            "gold": {"path": str(text)}, "ppo": {"watch_gold": watched, "eval_every": 2}
        })  # fmt: skip
        found = fingerprint(stage, cfg)
        assert ("gold" in found.sections) is watched and (f"gold.path={text}" in found.inputs) is watched
    with pytest.raises(ValueError, match="watch_gold measures gold at the evaluations of eval_every"):
        Config.model_validate({"ppo": {"watch_gold": True}})
