"""Damaged files: which are named, by which commands, and who refuses to work with them."""

import shutil

import pytest

from core.artefacts import open_partial, publish, read_manifest
from core.config.load import load
from core.errors import ArtefactError
from core.files import read_table, write_table
from pipelines import runs, stages
from pipelines.__main__ import main
from pipelines.inputs import check_inputs
from pipelines.stages import STAGES, fingerprint, in_use
from tests.builders.command_line import grm


@pytest.fixture
def config(tmp_path):
    """A function from overrides to a configuration whose external files exist."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("{}")
    paths = [f"{key}={tmp_path / 'model'}" for key in ("policy.path", "rm.base.path", "gold.path")]
    fixed = [*paths, f"run.dir={tmp_path / 'runs'}", f"data.prompts={tmp_path / 'prompts.jsonl'}"]
    return lambda *overrides: load([], [*fixed, *overrides])


@pytest.fixture
def run(config):
    """A run whose stages are finished; the folder."""
    cfg = config()
    for name in STAGES:
        finish(cfg, name)
    return cfg.run_dir


def finish(cfg, name: str) -> None:
    folder, wanted = cfg.run_dir / name, fingerprint(STAGES[name], cfg)
    partial = open_partial(folder, wanted)
    (partial / "a.safetensors").write_bytes(b"weights of " + name.encode())
    write_table(partial / "t.parquet", [{"a": k} for k in range(50)])
    publish(partial, folder, name, wanted, seed=1, seconds=1.0, metrics={"headline": "done"})


def damage(file) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"X")


def test_every_stage_refuses_a_damaged_input_by_name(config, run):
    for name, stage in STAGES.items():
        check_inputs(name, config())
        for needed in stage.inputs:
            file = run / needed / "t.parquet"
            whole = file.read_bytes()
            damage(file)
            with pytest.raises(
                ArtefactError, match=f"'{name}' needs '{needed}'(.|\n)*t.parquet is not what was(.|\n)*grm {needed} --f"
            ):
                check_inputs(name, config())
            file.write_bytes(whole)


def test_a_report_needs_no_weights_and_a_finished_one_nothing(config, run, capsys):
    (run / "rm" / "a.safetensors").unlink()
    check_inputs("report", config())
    with pytest.raises(ArtefactError, match="a.safetensors is missing"):
        check_inputs("ppo", config())
    damage(run / "eval" / "t.parquet")
    assert runs.settle("report", config(), None)
    with pytest.raises(ArtefactError, match="'report' needs 'eval'"):
        check_inputs("report", config())


def test_no_damaged_result_is_up_to_date_taken_back_or_linked(config, run):
    damage(run / "rm" / "a.safetensors")
    with pytest.raises(ArtefactError, match="rm: up to date, but files(.|\n)*a.safetensors is not what was written"):
        runs.settle("rm", config(), None)
    with pytest.raises(ArtefactError, match="rm: fits, but files"):
        other = config("run.name=b")
        for name in ("prompts", "preferences", "rm"):
            runs.settle(name, other, run)
    assert not (config("run.name=b").run_dir / "rm").exists()
    finish(config("rm.epochs=3"), "rm")  # the damaged one is kept
    with pytest.raises(ArtefactError, match="rm: was kept, but files"):
        runs.settle("rm", config(), None)


def test_status_names_damage_and_a_manifest_that_is_cut(config, run):
    assert all("up to date" in line for line in runs.status(config()))
    damage(run / "rm" / "a.safetensors")
    (run / "bon" / "manifest.json").write_bytes((run / "bon" / "manifest.json").read_bytes()[:50])
    lines = dict(zip(in_use(config()), runs.status(config()), strict=True))
    assert "damaged" in lines["rm"] and "rm/a.safetensors is not what was written" in lines["rm"]
    assert "damaged" in lines["bon"] and "up to date" in lines["preferences"]
    assert "bon/manifest.json is damaged" in lines["eval"]


def test_a_damaged_manifest_does_not_hide_other_runs(config, run, capsys):
    finish(config("run.name=b"), "prompts")
    (run / "rm" / "manifest.json").write_bytes(b"{")
    shutil.copytree(run / "rm", run / ".replaced" / "rm-0")
    assert grm("runs", run.parent) == 0 and grm("clean", run) == 0
    said = capsys.readouterr().out
    assert (
        "rm           damaged: " in said
        and said.startswith("b  ")
        and "rm-0  " in said
        and said.count("  damaged") == 2
    )
    assert grm("diff", run, run.parent / "b") == 2 and "manifest.json is damaged" in capsys.readouterr().err


def test_verify_names_each_damaged_file_and_what_makes_it_again(run, capsys):
    assert grm("verify", run) == 0
    damage(run / "rm" / "a.safetensors")
    (run / "bon" / "t.parquet").unlink()
    (run / "ppo" / "extra.json").write_text("{}")
    (run / "eval" / "t.parquet").write_bytes(b"")
    capsys.readouterr()
    assert grm("verify", run.parent) == 1
    said = capsys.readouterr().out
    for part in ("rm/a.safetensors is not what was written", "bon/t.parquet is missing", "eval/t.parquet is empty",
                 "ppo/extra.json was not written by the stage", "prompts: 2 files are what was written",
                 f"`grm rm --force` with the configuration of {run} makes it again"):  # fmt: skip
        assert part in said
    assert grm("verify", run / "nothing") == 2


def test_verify_reads_a_stage_that_policies_share_once(run, capsys):
    (run / "study.yaml").write_text("")
    own = run / "policies" / "p"
    own.mkdir(parents=True)
    (own / "rm").symlink_to("../../rm")
    shutil.copytree(run / "ppo", own / "ppo")
    (own / "bon").symlink_to("../../nothing")
    damage(own / "ppo" / "t.parquet")
    assert grm("verify", run) == 1
    said = capsys.readouterr().out
    assert said.count("rm: 2 files") == 1 and "policies/p/bon: is a link to" in said
    assert f"grm study --config {run / 'matrix.yaml'}" in said


def test_force_makes_a_stage_with_a_damaged_manifest_again(config, run):
    (run / "rm" / "manifest.json").write_text("{")
    stages.prepare("rm", config(), fingerprint(STAGES["rm"], config()), force=True)
    finish(config(), "rm")
    assert read_manifest(run / "rm") and (run / ".replaced" / "rm-without-manifest" / "t.parquet").exists()


def test_a_cut_table_is_one_message(run, tmp_path, capsys):
    cut = run / "eval" / "t.parquet"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(ArtefactError, match="t.parquet: not Parquet, or cut short"):
        read_table(cut)


def test_a_result_is_not_published_where_an_input_was_replaced_meanwhile(config, monkeypatch):
    cfg = config()
    for name in ("prompts", "preferences"):
        finish(cfg, name)

    class Replaces:
        @staticmethod
        def run(cfg, inputs, out):
            (out / "a.safetensors").write_bytes(b"of the old pairs")
            (inputs["preferences"] / "t.parquet").unlink()
            wanted, folder = fingerprint(STAGES["preferences"], cfg), inputs["preferences"]
            partial = open_partial(folder, wanted)
            write_table(partial / "t.parquet", [{"a": 0}])
            publish(partial, folder, "preferences", wanted, seed=1, seconds=1.0, metrics={"headline": "others"})
            return {"headline": "done"}

    monkeypatch.setattr(stages.importlib, "import_module", lambda _: Replaces)
    with pytest.raises(ArtefactError, match="'rm' read inputs that were replaced while it ran"):
        stages.run("rm", cfg)
    assert read_manifest(cfg.run_dir / "rm") is None


def test_a_stage_does_not_start_with_damaged_inputs(config, run, monkeypatch, capsys):
    from pipelines import launch

    monkeypatch.setattr(launch, "run_ranks", lambda *_, **__: pytest.fail("started"))
    damage(run / "rm" / "a.safetensors")
    arguments = [f"{key}={run.parents[1] / 'model'}" for key in ("policy.path", "rm.base.path", "gold.path")]
    arguments += [f"run.dir={run.parent}", f"data.prompts={run.parents[1] / 'prompts.jsonl'}"]
    (run.parents[1] / "empty.yaml").write_text("")
    assert main(["bon", "--config", str(run.parents[1] / "empty.yaml"), *arguments, "bon.samples=4"]) == 2
    assert "a.safetensors is not what was written" in capsys.readouterr().err
