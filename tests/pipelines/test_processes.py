"""Stages that processes divide, with real vLLM: one process and two write the same, also where they took turns.

All processes have one thread each, since the order of sums, and so rounding, depends on the number of threads.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from core.artefacts import open_partial, read_manifest
from core.config.load import load
from core.errors import EXIT_LOST
from core.files import read_table
from pipelines import stages
from tests.builders.processes import GRM, ROOT, background, wait_for

pytestmark = pytest.mark.e2e
TABLES = {
    "preferences": ("samples", "pairs", "calibration", "scores/gold"),
    "bon": ("samples", "scores/grm", "scores/bt", "scores/gold"),
    "eval": ("rl_eval", "steps/0000", "steps/0001"),
}


def settings(policy: Path, run: Path, prompts: Path) -> dict:
    """As small as the stages allow, in several shards each."""
    model, lora = {"path": str(policy)}, {"rank": 4, "alpha": 8, "top_layers": 1}
    return {
        "run": {"name": "shards", "dir": str(run)},
        "policy": model,
        "data": {"prompts": str(prompts), "max_prompt_tokens": 160},
        "generation": {"max_new_tokens": 12, "vllm": {"max_model_len": 192, "max_num_seqs": 16}},
        "preferences": {"max_train_pairs": 16, "max_val_pairs": 8, "max_calibration_prompts": 4, "shard_prompts": 6},
        "rm": {
            "base": model, "lora": lora, "global_batch": 8, "micro_batch": 4, "max_tokens": 192,
            "optim": {"lr": 1e-3},
            "variants": {"grm": {"text_regulariser": "sft", "alpha": 0.1}, "bt": {}},
        },
        "bon": {"samples": 4, "prompts": 10, "shard_prompts": 3},
        "ppo": {
            "ensemble": {"members": ["grm", "bt"], "combine": "min"}, "lora": lora, "steps": 1, "rollouts": 8,
            "micro_batch": 4, "minibatches": 1, "critic_trainable_layers": 1, "actor": {"lr": 1e-3},
        },
        "engine": {"processes": 1},
        "eval": {"prompts": 20, "samples": 2, "shard_prompts": 8, "bootstrap": 100},
    }  # fmt: skip


def command(stage: str, config: Path, processes: int, *more: str) -> list[str]:
    """`grm STAGE` with so many processes, on as many cores: one thread each."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:processes]))
    return ["taskset", "-c", cores, *GRM, stage, "-c", str(config), f"generation.processes={processes}", *more]


def run(*arguments: object) -> str:
    """What a command prints; a failed test if it fails."""
    done = subprocess.run([*map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
    return done.stderr


@pytest.fixture(scope="module")
def finished(small_policy, tmp_path_factory) -> Path:
    """The configuration of a run that one process has made."""
    folder = tmp_path_factory.mktemp("processes")
    lines = (ROOT / "data" / "prompts.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join(sorted(lines, key=len)[:200]))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(small_policy, folder, folder / "prompts.jsonl")))
    for stage in ("prompts", "preferences", "rm", "bon", "ppo", "eval"):
        run(*command(stage, config, 1))
    return config


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A run of one's own with the same finished stages, as the configuration of its folder."""
    shutil.copytree(finished.parent / "shards", tmp_path / "shards")
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(yaml.safe_load(finished.read_text()) | {"run": {"name": "shards", "dir": str(tmp_path)}})
    )
    return config


def tables(config: Path, stage: str) -> dict[str, list[dict]]:
    folder = config.parent / "shards" / stage
    return {name: read_table(folder / f"{name}.parquet") for name in TABLES[stage]}


def same_result(config: Path, finished: Path, stage: str) -> None:
    assert tables(config, stage) == tables(finished, stage)
    of_run, one = (read_manifest(c.parent / "shards" / stage) for c in (config, finished))
    assert of_run["metrics"] == one["metrics"]
    files = lambda manifest: sorted(output["path"] for output in manifest["outputs"])  # noqa: E731
    assert files(of_run) == files(one) and not any("shard" in path for path in files(one))


@pytest.mark.parametrize("stage", list(TABLES))
def test_two_processes_write_what_one_does(copied, finished, stage):
    said = run(*command(stage, copied, 2, "--force"))
    same_result(copied, finished, stage)
    assert said.count(f"{stage}: ") > 0 and said.count(" -> ") == 1, said  # the first process says what came of it
    assert "up to date" in run(*command(stage, copied, 1))  # the number of processes changes no result


@pytest.mark.parametrize(("stage", "first", "then"), [("preferences", 1, 2), ("bon", 2, 1), ("eval", 2, 1)])
def test_a_killed_stage_goes_on_with_another_number_of_processes(copied, finished, tmp_path, stage, first, then):
    shutil.rmtree(copied.parent / "shards" / stage)
    partial, log = copied.parent / "shards" / f"{stage}.partial", tmp_path / "log"
    with background(*command(stage, copied, first), log=log) as killed:
        wait_for(lambda: list(partial.glob("**/shard-*.parquet")), killed)
        killed.send_signal(signal.SIGKILL)
    kept = {path.relative_to(partial): path.read_bytes() for path in partial.glob("**/shard-*.parquet")}
    assert kept and not (copied.parent / "shards" / stage).exists()
    assert "resumes the unfinished work" in run(*command(stage, copied, then))
    same_result(copied, finished, stage)


def test_a_process_that_fails_is_named_and_the_others_end(copied):
    """The second process finds one of its shards damaged."""
    cfg = load([copied], [])
    shutil.rmtree(cfg.run_dir / "bon")
    partial = open_partial(cfg.run_dir / "bon", stages.fingerprint(stages.STAGES["bon"], cfg))
    (partial / "samples").mkdir()
    (partial / "samples" / "shard-0001.parquet").write_bytes(b"PAR1 cut short")
    done = subprocess.run(command("bon", copied, 2), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("grm bon")]
    assert len(errors) == 1 and errors[0].startswith("grm bon, rank 1: ") and "shard-0001.parquet" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_process_that_hangs_is_named_and_the_same_command_goes_on(copied, finished, tmp_path):
    shutil.rmtree(copied.parent / "shards" / "bon")
    partial, log = copied.parent / "shards" / "bon.partial", tmp_path / "log"
    with background(*command("bon", copied, 2, "engine.rank_timeout=6"), log=log) as stage:
        wait_for(lambda: list(partial.glob("samples/shard-*.parquet")), stage)
        second = next(
            int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ")
            if b"RANK=1" in (words := _words(path)) and f"GRM_LAUNCHER={stage.pid}".encode() in words
        )  # fmt: skip
        os.kill(second, signal.SIGSTOP)
        assert stage.wait(timeout=120) == EXIT_LOST
    said = log.read_text()
    assert "grm bon, rank 0: rank 1 is lost in phase " in said and "no sign of life for 6 s" in said, said[-3000:]
    run(*command("bon", copied, 2))
    same_result(copied, finished, "bon")


def _words(environ: Path) -> list[bytes]:
    try:
        return environ.read_bytes().split(b"\0")
    except OSError:  # ended meanwhile
        return []
