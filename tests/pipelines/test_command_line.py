"""What `grm` prints and refuses. No model is run."""

import pytest

from pipelines import command_line
from pipelines.__main__ import main


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
