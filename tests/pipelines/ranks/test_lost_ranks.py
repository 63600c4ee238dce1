"""One of two ranks of PPO is killed, stopped or fed a NaN, in each phase: real vLLM, ZeRO-3 and gloo."""

import os
import re
import subprocess

import pytest

from core.errors import EXIT_LOST, EXIT_REFUSED
from tests.builders.command_line import grm
from tests.builders.inputs.tiny_run import copy_of, same
from tests.builders.processes import GRM, ROOT

FAULTY = ROOT / "tests" / "programs" / "faulty"
SAID = {
    # kind: exit status, and what is said of a phase and a step
    "kill": (137, r"ppo: rank 1 was ended by SIGKILL in phase {phase} of step {step}, as it is where memory runs out; "
                  r"the same command goes on from what is saved"),
    "stop": (EXIT_LOST, r"grm ppo, rank 0: rank 1 is lost in phase {phase} of step {step}: no sign of life for 40 s "
                        r"\(engine\.rank_timeout\)\. This rank was in phase .*the same command goes on"),
    "nan": (EXIT_REFUSED, r"ppo step {step}.* are NaN or infinite, on rank.* of prompt|"
                          r"ppo step {step}.* weights of the actor.* are NaN or infinite, on rank"),
}  # fmt: skip
PHASES = (("collect", 2), ("train", 2), ("sync", 3), ("save", 3))


def ppo(config, fault: str = "") -> subprocess.CompletedProcess:
    paths = [str(path) for path in (FAULTY, ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GRM_TEST_FAULT": fault}
    command = [*GRM, "ppo", "--config", str(config)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def breaks(config, kind: str, phase: str, step: int) -> None:
    status, said = SAID[kind]
    done = ppo(config, f"{kind}:{phase}:{step}")
    assert done.returncode == status, f"{phase}: {done.returncode}\n{done.stderr[-4000:]}"
    assert re.search(said.format(phase=phase, step=step), done.stderr), done.stderr[-4000:]
    assert "Traceback" not in done.stderr and not (config.parent / "tiny" / "ppo").exists(), done.stderr[-4000:]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_the_same_command_goes_on(whole, tmp_path):
    config = copy_of(whole, tmp_path)
    breaks(config, "stop", "train", 2)
    assert ppo(config).returncode == 0 and same(tmp_path / "tiny", whole / "tiny")


@pytest.mark.long
@pytest.mark.parametrize("kind", SAID)
def test_a_fault_in_each_phase_is_named_and_the_result_is_that_of_an_unbroken_run(whole, tmp_path, kind, capsys):
    """Each start goes on from what the one before has saved."""
    config = copy_of(whole, tmp_path)
    for phase, step in PHASES:
        breaks(config, kind, phase, step)
        if kind == "nan":
            assert grm("replay", tmp_path / "tiny" / "faults" / f"ppo-step-{step:04d}") == 0
            assert "seen again" in capsys.readouterr().out
    done = ppo(config)
    assert done.returncode == 0 and same(tmp_path / "tiny", whole / "tiny"), done.stderr[-4000:]
