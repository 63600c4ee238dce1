"""What becomes of results when configurations change, and runs that take stages from others. No model is run."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from core.artefacts import (
    Fingerprint,
    manifest_digest,
    open_partial,
    partial_of,
    publish,
    read_fingerprint,
    read_manifest,
)
from core.config.load import load
from core.errors import ArtefactError
from pipelines import runs, stages
from pipelines.__main__ import main
from pipelines.stages import STAGES, fingerprint


@pytest.fixture
def config(tmp_path):
    """A function from overrides to a configuration whose external files exist."""
    for name in ("policy", "gold"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("{}")
    fixed = [
        f"run.dir={tmp_path / 'runs'}", f"policy.path={tmp_path / 'policy'}", f"rm.base.path={tmp_path / 'policy'}",
        f"gold.path={tmp_path / 'gold'}", f"data.prompts={tmp_path / 'prompts.jsonl'}", "run.name=a",
    ]  # fmt: skip
    return lambda *overrides: load([], [*fixed, *overrides])


def finish(cfg, *names, text="result"):
    """Publish stages as if they had run."""
    for name in names:
        folder, wanted = cfg.run_dir / name, fingerprint(STAGES[name], cfg)
        partial = open_partial(folder, wanted)
        (partial / "result.txt").write_text(f"{name} {text}")
        metrics = {"headline": text, "x": len(text)}
        publish(partial, folder, name, wanted, seed=1, seconds=1.0, metrics=metrics)


def result(cfg, name):
    return (cfg.run_dir / name / "result.txt").read_text()


def test_another_run_gives_what_fits_and_the_rest_will_run(config, capsys):
    first, second = config(), config("run.name=b", "ppo.kl.coef=0.1")
    finish(first, "prompts", "preferences", "rm", "ppo")
    steps = dict(runs.plan("ppo", second, first.run_dir))
    assert [steps[s] for s in ("prompts", "preferences", "rm")] == ["linked"] * 3 and "bon" not in steps
    assert steps["ppo"] == "will run, because ppo.kl.coef: 0.05 -> 0.1"
    assert not second.run_dir.exists()
    settled = [runs.settle(name, second, first.run_dir) for name in runs.needed_by("ppo", second)]
    assert settled == [True, True, True, False]
    link = second.run_dir / "rm"
    assert link.is_symlink() and not os.path.isabs(os.readlink(link)) and result(second, "rm") == "rm result"
    assert stages.staleness("rm", second) == []
    assert "linked from" in capsys.readouterr().err


def test_what_depends_on_a_stage_that_differs_will_run_too(config):
    first, noisy = config(), config("run.name=noise25", "preferences.label_noise=0.25")
    finish(first, "prompts", "preferences", "rm")
    steps = dict(runs.plan("rm", noisy, first.run_dir))
    assert steps["prompts"] == "linked" and "preferences.label_noise: 0.0 -> 0.25" in steps["preferences"]
    assert steps["rm"] == "will run, because preferences will be re-run"


def test_a_linked_stage_is_never_written_through(config):
    first, second = config(), config("run.name=b")
    finish(first, "prompts", "preferences")
    for name in ("prompts", "preferences"):
        assert runs.settle(name, second, first.run_dir)
    changed = config("run.name=b", "preferences.label_noise=0.1")
    finish(changed, "preferences", text="noisy")
    assert result(first, "preferences") == "preferences result" and result(second, "preferences") == "preferences noisy"
    assert stages.staleness("preferences", first) == [] and not (second.run_dir / "preferences").is_symlink()


def test_a_wrong_source_is_an_error(config, tmp_path):
    cfg = config()
    finish(cfg, "prompts")
    with pytest.raises(ArtefactError, match="no finished stage"):
        runs.check_source(cfg, tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="is this run itself"):
        runs.check_source(cfg, cfg.run_dir)


def test_a_replaced_result_is_kept_and_taken_back(config, capsys):
    plain, noisy = config(), config("preferences.label_noise=0.25")
    finish(plain, "prompts", "preferences")
    digest = manifest_digest(read_manifest(plain.run_dir / "preferences"))
    finish(noisy, "preferences", text="noisy")
    kept = plain.run_dir / ".replaced" / f"preferences-{digest}"
    assert (kept / "result.txt").read_text() == "preferences result" and result(
        noisy, "preferences"
    ) == "preferences noisy"
    assert not runs.settle("preferences", config("preferences.label_noise=0.5"), None)
    assert runs.settle("preferences", plain, None) and result(plain, "preferences") == "preferences result"
    assert "that was kept in" in capsys.readouterr().err
    assert runs.settle("preferences", noisy, None) and result(noisy, "preferences") == "preferences noisy"


def test_unfinished_work_of_another_configuration_is_kept(config, capsys):
    cfg, other = config(), config("data.max_prompt_tokens=100")
    folder = cfg.run_dir / "prompts"
    wanted = fingerprint(STAGES["prompts"], cfg)
    (open_partial(folder, wanted) / "shard").write_text("hours of work")
    stages.prepare("prompts", other, fingerprint(STAGES["prompts"], other))
    (kept,) = runs.kept(cfg.run_dir)
    assert (kept / "shard").read_text() == "hours of work" and kept.name.startswith("prompts.partial-")
    said = capsys.readouterr().err
    assert "data.max_prompt_tokens: 256 -> 100" in said and str(kept) in said
    assert not any(partial_of(folder).glob("shard"))


def test_a_field_that_is_younger_than_the_manifest_has_its_default(config):
    cfg = config()
    finish(cfg, "prompts", "preferences", "rm", "ppo")
    manifest = read_manifest(cfg.run_dir / "ppo")
    for path in (("ppo", "gamma"), ("ppo", "kl", "horizon"), ("ppo", "epochs")):
        old = json.loads(json.dumps(manifest))
        section = old["config"]
        for key in path[:-1]:
            section = section[key]
        del section[path[-1]]
        assert fingerprint(STAGES["ppo"], cfg).differences(old) == []
        other = {"gamma": "0.9", "horizon": "5", "epochs": "2"}[path[-1]]
        changed = config(f"{'.'.join(path)}={other}")
        (line,) = fingerprint(STAGES["ppo"], changed).differences(old)
        assert line.startswith(f"{'.'.join(path)}: nothing -> ")


def test_a_new_entry_of_a_mapping_is_no_new_field(config):
    one, two = config("rm.variants={bt: {}}", "ppo.proxy=bt"), config("rm.variants={bt: {}, other: {}}", "ppo.proxy=bt")
    finish(one, "prompts", "preferences", "rm")
    assert any(line.startswith("rm.variants.other.") for line in stages.staleness("rm", two))
    null = config("rm.variants={bt: {}}", "ppo.proxy=bt", "ppo.lora=null")
    finish(null, "ppo")
    assert any(line.startswith("ppo.lora") for line in stages.staleness("ppo", one))


def test_options_that_cannot_change_a_result_make_nothing_stale(config):
    cfg = config()
    finish(cfg, "prompts", "preferences", "rm", "ppo")
    passive = config("ppo.trackers=[wandb]", "ppo.server_timeout=5", "ppo.keep_state=false", "ppo.save_every=1")
    assert stages.staleness("ppo", passive) == []


def with_state(cfg, step):
    finish(cfg, "prompts", "preferences", "rm", "ppo")
    state = cfg.run_dir / "ppo" / "state"
    (state / f"{step:06d}").mkdir(parents=True)
    (state / f"{step:06d}" / "weights").write_text("w")
    (state / "last.json").write_text(json.dumps({"step": step}))
    (cfg.run_dir / "ppo" / "policy").mkdir()
    return cfg


def test_more_steps_continue_a_finished_run(config, capsys):
    short, long = with_state(config("ppo.steps=12"), 12), config("ppo.steps=14")
    wanted = fingerprint(STAGES["ppo"], long)
    stages.prepare("ppo", long, wanted)
    partial = partial_of(long.run_dir / "ppo")
    assert (partial / "state" / "000012" / "weights").is_file() and not (partial / "policy").exists()
    assert not wanted.differences(read_fingerprint(partial)) and read_manifest(partial) is None
    assert stages.staleness("ppo", short) == []  # the finished run is as it was
    assert "ppo.steps 12 -> 14 continues from the last state" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["ppo.steps=14", "ppo.actor.schedule=cosine"], "ppo.actor.schedule cosine"),
        (["ppo.steps=500"], "ppo.actor.warmup 0.03 depends on ppo.steps"),
        (["ppo.steps=14", "ppo.critic.schedule=linear"], "ppo.critic.schedule linear"),
    ],
)
def test_a_schedule_that_depends_on_the_number_of_steps_starts_again(config, capsys, overrides, reason):
    fixed = [o for o in overrides if not o.startswith("ppo.steps")]
    with_state(config("ppo.steps=12", *fixed), 12)
    long = config(*overrides)
    stages.prepare("ppo", long, fingerprint(STAGES["ppo"], long))
    assert not partial_of(long.run_dir / "ppo").exists()
    assert reason in (said := capsys.readouterr().err) and "instead of continuing" in said


def test_runs_are_listed_compared_and_cleaned(config, capsys):
    first, second = config(), config("run.name=b", "preferences.label_noise=0.25")
    finish(first, "prompts", "preferences")
    finish(second, "prompts", "preferences", text="noisy labels")
    assert main(["runs", str(first.run.dir)]) == 0
    listed = capsys.readouterr().out
    assert "a  " in listed and "noisy labels" in listed and "prompts, preferences" in listed
    assert main(["diff", str(first.run_dir), str(second.run_dir)]) == 0
    differences = capsys.readouterr().out
    assert "preferences.label_noise: 0.0 | 0.25" in differences and "x: 6 | 12" in differences
    finish(config("preferences.label_noise=0.1"), "preferences", text="other")
    assert main(["clean", str(first.run_dir)]) == 0 and len(runs.kept(first.run_dir)) == 1
    assert main(["clean", str(first.run_dir), "--yes"]) == 0 and not runs.kept(first.run_dir)
    assert result(first, "preferences") == "preferences other"


def test_a_link_that_leads_nowhere_is_replaced(config):
    first, second = config(), config("run.name=b")
    finish(first, "prompts")
    second.run_dir.mkdir()
    (second.run_dir / "prompts").symlink_to("../gone/prompts")
    assert runs.settle("prompts", second, first.run_dir) and result(second, "prompts") == "prompts result"


def test_force_runs_the_stage_itself_and_links_the_others(config):
    first, second = config(), config("run.name=b")
    finish(first, "prompts", "preferences")
    steps = runs.plan("preferences", second, first.run_dir, force=True)
    assert steps == [("prompts", "linked"), ("preferences", "will run, because of --force")]


def test_unfinished_work_is_resumed_when_its_configuration_returns(config, capsys):
    cfg, other = config(), config("data.max_prompt_tokens=100")
    folder = cfg.run_dir / "prompts"
    (open_partial(folder, fingerprint(STAGES["prompts"], cfg)) / "shard").write_text("hours of work")
    stages.prepare("prompts", other, fingerprint(STAGES["prompts"], other))
    stages.prepare("prompts", cfg, fingerprint(STAGES["prompts"], cfg))
    assert (partial_of(folder) / "shard").read_text() == "hours of work" and not runs.kept(cfg.run_dir)
    assert "resumes the unfinished work that was kept in" in capsys.readouterr().err


def test_force_loses_no_unfinished_work(config):
    cfg = config()
    folder, wanted = cfg.run_dir / "prompts", fingerprint(STAGES["prompts"], cfg)
    for text in ("first", "second"):
        (open_partial(folder, wanted) / "shard").write_text(text)
        stages.prepare("prompts", cfg, wanted, force=True)
        assert not partial_of(folder).exists()
    assert [(path / "shard").read_text() for path in runs.kept(cfg.run_dir)] == ["first", "second"]


def test_an_equal_result_is_kept_once(config):
    cfg = config()
    finish(cfg, "prompts")
    finish(cfg, "prompts")  # as by --force
    assert not runs.kept(cfg.run_dir)
    finish(cfg, "prompts", text="another")
    finish(cfg, "prompts", text="result")
    (kept,) = runs.kept(cfg.run_dir)
    assert (kept / "result.txt").read_text() == "prompts another" and result(cfg, "prompts") == "prompts result"


def test_states_are_no_outputs_but_a_reward_model_may_be_called_state(tmp_path):
    wanted, outputs = Fingerprint({}), {}
    for name, resumable in (("ppo", "state"), ("rm", None)):
        partial = open_partial(tmp_path / name, wanted)
        for file in ("state/weights", "policy/state/weights"):
            (partial / file).parent.mkdir(parents=True)
            (partial / file).write_text("w")
        publish(partial, tmp_path / name, name, wanted, seed=1, seconds=1.0, metrics={}, resumable=resumable)
        outputs[name] = [output["path"] for output in read_manifest(tmp_path / name)["outputs"]]
    assert outputs == {"ppo": ["policy/state/weights"], "rm": ["policy/state/weights", "state/weights"]}


def test_a_copy_that_was_cut_short_is_not_resumed(config, monkeypatch):
    """A kill while the finished run is copied, to be continued."""
    with_state(config("ppo.steps=12"), 12)
    long = config("ppo.steps=14")
    wanted = fingerprint(STAGES["ppo"], long)

    def killed(source, target, **options):
        shutil.copytree(source, target, **options)
        (target / "state" / "000012" / "weights").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "shutil", SimpleNamespace(**{**vars(shutil), "copytree": killed}))
    with pytest.raises(KeyboardInterrupt):
        stages.prepare("ppo", long, wanted)
    monkeypatch.undo()
    stages.prepare("ppo", long, wanted)
    assert (partial_of(long.run_dir / "ppo") / "state" / "000012" / "weights").is_file()


def test_unfinished_and_nested_runs_are_listed_and_nothing_is_counted_twice(config):
    study, policy, begun = config(), config("run.name=a/policies/p"), config("run.name=begun")
    finish(study, "prompts")
    policy.run_dir.mkdir(parents=True)
    assert runs.settle("prompts", policy, study.run_dir)
    finish(policy, "preferences", text="x" * 100_000)
    (open_partial(begun.run_dir / "prompts", fingerprint(STAGES["prompts"], begun)) / "shard").write_text("work")
    heads = {line.split()[0]: line for line in runs.list_runs(study.run.dir) if not line.startswith(" ")}
    assert list(heads) == ["a", "a/policies/p", "begun"]
    assert "prompts (unfinished)" in heads["begun"] and "prompts (linked), preferences" in heads["a/policies/p"]
    assert " KB " in heads["a/policies/p"] and float(heads["a/policies/p"].split()[1]) > 100
    assert float(heads["a"].split()[1]) < 10  # without the policy


def test_differences_are_of_stages_that_both_have(config, capsys):
    """Seeds count, names of runs do not, nor what only one has run, nor fields younger than a manifest."""
    first, second = config("bon.samples=8"), config("run.name=b", "run.seed=7", "rm.variants.other={}")
    finish(first, "prompts", "preferences", "rm", "bon")
    finish(second, "prompts", "preferences", "rm")
    file = first.run_dir / "rm" / "manifest.json"
    old = json.loads(file.read_text())
    del old["config"]["rm"]["overlong"], old["manifest_digest"]  # which is younger than the field
    file.write_text(json.dumps(old))
    lines = runs.diff(first.run_dir, second.run_dir)
    keys = [line.split(":")[0].strip() for line in lines[1 : lines.index("prompts:")]]
    assert "run.seed" in keys and "run.name" not in keys and not any(key.startswith("bon") for key in keys)
    assert "rm.variants.other.head" in keys and "rm.overlong" not in keys and "  b: not run" in lines


def test_numbers_of_a_stage_are_compared_at_any_depth():
    metrics = {"variants": {"grm": {"accuracy": {"mean": 0.5, "lo": 0.1}}}, "first": {"x": 1}, "seconds": 3}
    other = {"variants": {"grm": {"accuracy": {"mean": 0.6, "lo": 0.2}}}, "first": {"x": 2}, "seconds": 4}
    assert runs._numbers(metrics, other) == ["variants.grm.accuracy.mean: 0.5 | 0.6"]


def test_clean_takes_a_run_or_a_configuration_and_runs_below(config, tmp_path, capsys):
    study, policy = config(), config("run.name=a/policies/p")
    for cfg in (study, policy):
        finish(cfg, "prompts")
        finish(cfg, "prompts", text="another")
    file = tmp_path / "a.yaml"
    file.write_text(f"run: {{name: a, dir: {tmp_path / 'runs'}}}\n")
    assert main(["clean", "--config", str(file)]) == 0
    listed = capsys.readouterr().out
    assert all(str(cfg.run_dir / ".replaced") in listed for cfg in (study, policy)) and runs.kept(policy.run_dir)
    assert main(["clean", str(tmp_path / "nothing")]) == 2 and "no run" in capsys.readouterr().err
    assert main(["clean", "--config", str(file), "--yes"]) == 0
    assert not runs.kept(study.run_dir) and not runs.kept(policy.run_dir) and result(policy, "prompts")


def test_equal_fingerprints_are_equal_whatever_the_order():
    first = Fingerprint({"a": {"x": 1, "y": [1, 2]}}, {"p": "1", "q": "2"})
    assert first.differences({"inputs": {"q": "2", "p": "1"}, "config": {"a": {"y": [1, 2], "x": 1}}}) == []
