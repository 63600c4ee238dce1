"""What a section `sft` changes for the other stages, and that its absence changes nothing."""

import pytest

from core.artefacts import open_partial, publish, read_manifest
from core.config.load import load
from core.errors import ArtefactError, ConfigError
from pipelines import runs, stages
from pipelines.__main__ import main
from pipelines.stages import STAGES, fingerprint


@pytest.fixture
def config(tmp_path):
    """A function from overrides to a configuration whose external files exist."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("prompts", "demonstrations"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    paths = [f"{key}={tmp_path / 'model'}" for key in ("policy.path", "rm.base.path", "gold.path")]
    fixed = [*paths, f"run.dir={tmp_path}/runs", "run.name=a", f"data.prompts={tmp_path}/prompts.jsonl"]
    return lambda *overrides: load([], [*fixed, *overrides])


def finish(cfg, *names):
    for name in names:
        folder, wanted = cfg.run_dir / name, fingerprint(STAGES[name], cfg)
        partial = open_partial(folder, wanted)
        (partial / "result.txt").write_text(name)
        publish(partial, folder, name, wanted, seed=1, seconds=1.0, metrics={"headline": "done"})


def states(cfg) -> dict[str, str]:
    return {line.split()[0]: line for line in runs.status(cfg)}


def test_later_stages_have_the_fine_tuned_policy_and_the_chat_options_of_its_base(config, tmp_path):
    plain, tuned = config("policy.pad_token=x", "rm.base.pad_token=x"), None
    assert plain.after_sft() is plain
    tuned = config(f"sft.data={tmp_path}/demonstrations.jsonl", "policy.revision=abc", "policy.attention=eager",
                   "policy.pad_token=x", "rm.base.pad_token=x").after_sft()  # fmt: skip
    assert tuned.policy.path == str(tmp_path / "runs" / "a" / "sft" / "policy")
    assert (tuned.policy.revision, tuned.policy.attention, tuned.policy.pad_token) == (None, "eager", "x")
    assert tuned.rm.base.path == str(tmp_path / "model")


def test_what_is_sampled_from_the_policy_depends_on_its_demonstrations(config, tmp_path):
    data = tmp_path / "demonstrations.jsonl"
    cfg = config(f"sft.data={data}")
    finish(cfg, "prompts", "sft", "preferences", "rm", "bon", "ppo", "eval", "report")
    assert all("up to date" in line for line in states(cfg).values()) and len(states(cfg)) == 8
    for stage, follows in {"prompts": False, "preferences": True, "rm": False, "ppo": True, "eval": True}.items():
        assert ("sft" in read_manifest(cfg.run_dir / stage)["inputs"]) is follows, stage
    changed = states(config(f"sft.data={data}", "sft.epochs=2"))
    assert "stale: sft.epochs: 1 -> 2" in changed["sft"] and "up to date" in changed["prompts"]
    assert all("'sft', which is out of date" in changed[s] or "out of date" in changed[s] for s in ("rm", "ppo", "bon"))
    data.write_text("{}\n{}")
    stages._digests.clear()
    assert "changed" in states(cfg)["sft"]
    # A moved run stays up to date: the place of the fine-tuned policy is in no fingerprint.
    data.write_text("{}")
    stages._digests.clear()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert all(
        "up to date" in line for line in states(config(f"sft.data={data}", f"run.dir={tmp_path}/elsewhere")).values()
    )


def test_without_the_section_there_is_no_such_stage(config, capsys):
    cfg = config()
    finish(cfg, "prompts", "preferences")
    assert "sft" not in states(cfg) and "sft" not in read_manifest(cfg.run_dir / "preferences")["inputs"]
    assert main(["sft", "--config", "configs/smoke.yaml"]) == 0
    assert "sft: nothing to do: the configuration has no section `sft`" in capsys.readouterr().err


def test_a_stage_that_waits_for_it_says_so_and_another_run_gives_it(config, tmp_path):
    cfg = config(f"sft.data={tmp_path}/demonstrations.jsonl")
    finish(cfg, "prompts")
    with pytest.raises(ArtefactError, match="stage 'preferences' needs 'sft', which has not run: run `grm sft` first"):
        fingerprint(STAGES["preferences"], cfg)
    finish(cfg, "sft", "preferences")
    other = config(f"sft.data={tmp_path}/demonstrations.jsonl", "run.name=b", "rm.epochs=2")
    assert dict(runs.plan("rm", other, cfg.run_dir)) == {
        "prompts": "linked", "sft": "linked", "preferences": "linked",
        "rm": f"will run, because {cfg.run_dir} has no rm",
    }  # fmt: skip


def test_options_that_do_not_fit(config):
    with pytest.raises(ConfigError, match="sft.data: Field required"):
        config("sft.epochs=2")
    with pytest.raises(ConfigError, match="sft: optim.skip_above is for rm and ppo"):
        config("sft.data=x.jsonl", "sft.optim.skip_above=6")
    with pytest.raises(ConfigError, match=r"sft.global_batch 32 is not divisible by 3 ranks \(sft.engine.processes"):
        config("sft.data=x.jsonl", "sft.engine.processes=3")
    with pytest.raises(ConfigError, match="sft.epoch: no such key .*sft.epochs"):
        config("sft.data=x.jsonl", "sft.epoch=3")
