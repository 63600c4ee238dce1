"""Both ways of starting a stage, `grm` and the user's own torchrun, check and settle the same things."""

import os
import shutil
import subprocess
import sys

import pytest

from core import environment
from core.config.load import load
from core.environment import variables
from core.errors import ConfigError
from core.files import read_rows
from pipelines import launch
from pipelines.__main__ import main
from tests.builders.processes import GRM, ROOT

SMOKE = ("--config", "configs/smoke.yaml")


def torchrun(ranks: int, *arguments: object, timeout: int = 120) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node RANKS -m pipelines ARGUMENTS`, as a user types it: without our environment."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {key: value for key, value in os.environ.items() if key not in variables(1)} | {"PATH": os.environ["PATH"]}
    return subprocess.run(
        [*launcher, "-m", "pipelines", *map(str, arguments)], cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_of_torchrun_starts_again_in_the_environment_of_a_stage(monkeypatch, ranks):
    called = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("GRM_STAGE_STARTED", raising=False)
    monkeypatch.setattr(os, "execve", lambda *given: called.append(given))
    monkeypatch.setattr(launch, "run_here", lambda *_, **__: None)
    assert main(["ppo", *SMOKE]) == 0
    ((program, command, env),) = called
    assert (program, command[-4:]) == (sys.executable, ["pipelines", "ppo", *SMOKE])
    assert env.items() >= variables(ranks).items() and env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.parametrize("started", [[], ["GRM_STAGE_STARTED"]])
@pytest.mark.parametrize(
    ("stage", "said"),
    [("ppo", "ppo.rollouts 32 is not divisible by 3 ranks (engine.processes, or torchrun's) x ppo.micro_batch 4 x "
             "ppo.minibatches 2 = 24"), ("report", "runs in one process, and torchrun started 3: use `grm report`")],
)  # fmt: skip
def test_a_number_of_ranks_that_does_not_fit_is_refused(monkeypatch, capsys, stage, said, started):
    """Whoever started the ranks, and whatever engine.processes says of another launch."""
    for name in ("TORCHELASTIC_RUN_ID", "GRM_STAGE_STARTED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TORCHELASTIC_RUN_ID", *started):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main([stage, *SMOKE, "ppo.rollouts=32", "engine.processes=2"]) == 2
    assert said in capsys.readouterr().err


def test_each_stage_has_its_own_number_of_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    cfg = load(
        [ROOT / "configs" / "smoke.yaml"], ["rm.engine.processes=1", "ppo.engine.processes=2", "generation.processes=3"]
    )
    assert [launch.num_processes(stage, cfg) for stage in ("rm", "ppo", "bon", "report")] == [1, 2, 3, 1]
    fits_ppo = load([ROOT / "configs" / "smoke.yaml"], ["ppo.rollouts=48"])
    launch.check_ranks("ppo", fits_ppo, 3)  # whatever the batches of reward models are
    with pytest.raises(ConfigError, match="rm.global_batch 16 is not divisible by 3 ranks"):
        launch.check_ranks("rm", fits_ppo, 3)


@pytest.mark.parametrize("cores", [1, 2])
def test_a_stage_has_no_more_processes_than_cores_that_it_may_use(monkeypatch, cores):
    """The machine may have more: a container's or a policy's share of them counts."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    cfg = load([ROOT / "configs" / "study.yaml"], ["generation.processes=2"])
    assert [launch.num_processes(stage, cfg) for stage in ("rm", "ppo", "bon", "eval")] == [cores] * 4


def test_processes_that_divide_a_stage_see_a_gpu_each(monkeypatch):
    """One for each GPU by default; of several machines' processes, those of this machine count."""
    monkeypatch.setattr(environment, "num_gpus", lambda: 4)
    monkeypatch.setattr(launch, "num_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    cfg = load([ROOT / "configs" / "smoke.yaml"], [])
    assert [launch.num_processes(stage, cfg) for stage in ("preferences", "bon", "eval")] == [4, 4, 4]
    seen = [launch.own_variables("bon", 4, number)["CUDA_VISIBLE_DEVICES"] for number in range(4)]
    assert seen == ["2", "3", "5", "7"]
    assert launch.own_variables("ppo", 4, 1) == launch.own_variables("bon", 1, 0) == {}
    with pytest.raises(ConfigError, match="here are 4: lower generation.processes"):
        launch.own_variables("bon", 5, 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.own_variables("bon", 4, 3) == {"CUDA_VISIBLE_DEVICES": "3"}


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("name", ["smoke", "offline", "study", "exact-answer"])
def test_configurations_for_two_cores_fit_a_machine_with_gpus(monkeypatch, name, gpus):
    """What is set for a CPU must not start more processes than there are GPUs, nor ranks that batches do not fit."""
    monkeypatch.setattr(launch, "num_gpus", lambda: gpus)
    cfg = load([ROOT / "configs" / f"{name}.yaml"], [])
    ranks = {stage: launch.num_processes(stage, cfg) for stage in ("preferences", "rm", "bon", "ppo", "eval")}
    assert ranks["rm"] == ranks["ppo"] == gpus and max(ranks.values()) <= gpus
    if gpus == 1:
        for stage in ranks:
            launch.check_ranks(stage, cfg, 1)
    with pytest.raises(ConfigError, match=rf"is {gpus + 1}, and every rank needs a GPU of its own: there are {gpus}"):
        launch.num_processes(
            "ppo", cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"processes": gpus + 1})})
        )


@pytest.mark.slow
def test_torchrun_with_ranks_that_do_not_fit(tmp_path):
    done = torchrun(3, "ppo", *SMOKE, "ppo.rollouts=32", f"run.dir={tmp_path}")
    assert done.returncode != 0 and "ppo.rollouts 32 is not divisible by 3 ranks" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torchrun_runs_a_stage_once_as_grm_does(tmp_path):
    """Up to date is up to date, whoever asks: else a second start would replace a finished result."""
    run = (*SMOKE, f"run.dir={tmp_path}")
    first, second = torchrun(1, "prompts", *run), torchrun(1, "prompts", *run)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "prompts: up to date" not in first.stderr and "prompts: up to date" in second.stderr
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    third = subprocess.run([*GRM, "prompts", *run], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert third.returncode == 0 and "prompts: up to date" in third.stderr


@pytest.mark.long
@pytest.mark.e2e
def test_ppo_under_torchrun_with_one_rank_and_with_two(run_dir, tmp_path):
    """The step that `grm ppo` makes with as many ranks, and nothing again where it is finished."""
    for stage in ("prompts", "preferences", "rm"):
        shutil.copytree(run_dir / stage, tmp_path / "smoke" / stage)
    for ranks in (1, 2):
        job = ("ppo", *SMOKE, f"run.dir={tmp_path}", "ppo.steps=1")
        done = torchrun(ranks, *job, "--force", timeout=900)
        assert done.returncode == 0, done.stderr[-6000:]
        (row,) = read_rows(tmp_path / "smoke" / "ppo" / "metrics.jsonl")
    untimed = lambda r: {k: v for k, v in r.items() if "second" not in k}  # noqa: E731
    assert untimed(row) == untimed(read_rows(run_dir / "ppo" / "metrics.jsonl")[0])
    again = torchrun(2, *job)
    assert again.returncode == 0 and "ppo: up to date" in again.stderr


def test_groups_of_ranks_must_divide_them():
    two = load([], ["generation.vllm.overrides={tensor_parallel_size: 2}", "ppo.rollouts=48", "ppo.micro_batch=4"])
    launch.check_ranks("ppo", two, 2)
    with pytest.raises(ConfigError, match="tensor_parallel_size 2 does not divide 3 ranks"):
        launch.check_ranks("ppo", two, 3)
    servers = load([], ["generation.vllm.overrides={tensor_parallel_size: 4}", "ppo.vllm_servers=[http://a:1]"])
    launch.check_ranks("ppo", servers, 2)
    pipeline = load([], ["generation.vllm.overrides={pipeline_parallel_size: 2}"])
    with pytest.raises(ConfigError, match="pipeline_parallel_size is for ppo.vllm_servers"):
        launch.check_ranks("ppo", pipeline, 2)
