"""What `grm` prints and refuses. No model is run."""

import os
import subprocess
import sys

import pytest

from core.environment import may_have_gpu
from pipelines import command_line
from pipelines.__main__ import main
from tests.builders.processes import ROOT

SCRIPT = """
import sys, rm, ppo, bon, pipelines
from pipelines import __main__, launch
from core.config import Config
from core.environment import variables
launch.num_processes("ppo", Config())
variables(2)
print(*sys.modules)
"""


def test_every_command_is_listed_with_what_it_does(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in command_line.COMMANDS)
    assert shown.index("\n  rm ") < shown.index("\n  report ") < shown.index("\n  rm-eval ")


@pytest.mark.parametrize(("wrong", "meant"), [("pppo", "ppo"), ("rm-evaluate", "rm-eval"), ("stats", "status")])
def test_an_unknown_command_names_the_nearest_and_all(capsys, wrong, meant):
    assert main([wrong, "--config", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"did you mean {meant}?" in said and "rm-serve" in said and "study" in said


def test_a_stage_explains_what_it_reads_writes_and_its_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ppo", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "reads:  prompts, rm" in shown and "writes: runs/<name>/ppo/" in shown
    assert "ppo.kl.coef=0.05" in shown and "--from" in shown and "bon.samples" not in shown


def test_options_and_overrides_in_any_order(capsys):
    for arguments in (
        ["config", "ppo.steps=5", "--config", "configs/smoke.yaml", "ppo.seed=3"],
        ["--config", "configs/smoke.yaml", "config", "ppo.steps=5", "ppo.seed=3"],
    ):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert "steps: 5" in shown and "name: smoke" in shown


def test_files_are_laid_over_each_other_in_their_order(tmp_path, capsys):
    for name, steps in (("a", 5), ("b", 6)):
        (tmp_path / f"{name}.yaml").write_text(f"ppo: {{steps: {steps}}}\n")
    assert main(["config", "-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml")]) == 0
    assert "steps: 6" in capsys.readouterr().out


def test_options_are_explained(capsys):
    assert main(["config", "--explain", "ppo.kl"]) == 0
    shown = capsys.readouterr().out
    assert "ppo.kl.coef = 0.05" in shown and "ppo.clip" not in shown
    assert main(["config", "--explain", "rm.variants.grm.alpha"]) == 0
    assert "text regulariser" in capsys.readouterr().out
    assert main(["config", "--explain", "ppo.kll"]) == 2
    assert "ppo.kl" in capsys.readouterr().err


@pytest.mark.skipif(may_have_gpu(), reason="torch is asked how many GPUs there are")
def test_import_is_light():
    """`grm` itself, up to the start of a stage's process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"vllm", "deepspeed", "torch"} & set(done.stdout.split())


def grm(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip


def test_bad_input_is_one_message_and_exit_2(tmp_path):
    done = grm("ppo", "--config", "configs/smoke.yaml", "ppo.kl.coeff=1", "bon.n_max=99")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the nearest is ppo.kl.coef" in done.stderr and "n_max 99 exceeds the pool" in done.stderr


def test_missing_inputs_name_the_stage_to_run(tmp_path):
    done = grm("rm", "--config", "configs/smoke.yaml", f"run.dir={tmp_path}")
    assert done.returncode == 2 and "run `grm preferences` first" in done.stderr
    missing = grm("prompts", "--config", "configs/smoke.yaml", "data.prompts=no/such.jsonl")
    assert missing.returncode == 2 and "no/such.jsonl" in missing.stderr and "Traceback" not in missing.stderr
