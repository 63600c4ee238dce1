"""make and its scripts: what is set up by itself, and what every file must be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.pair_files import chat, unified, write
from tests.builders.processes import ROOT, make


def checkout(folder: Path) -> Path:
    """A set-up checkout as far as `ready.sh` sees it, with a `setup.sh` that only says that it was called."""
    files = (".venv/bin/grm", ".venv/.setup-stamp", "requirements/cpu.txt", "pyproject.toml",
             *(f"models/{name}/SOURCE.json" for name in ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2")))  # fmt: skip
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch(0o755)
        os.utime(folder / name, (1000, 2000 if "stamp" in name else 1000))
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "ready.sh", folder / "scripts")
    (folder / "scripts" / "setup.sh").write_text("echo called setup\n")
    return folder


def ready(folder: Path) -> list[str]:
    done = subprocess.run(["bash", folder / "scripts" / "ready.sh"], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


def test_make_says_nothing_where_all_is_set_up(tmp_path):
    assert ready(checkout(tmp_path)) == []


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (".venv", "no .venv here: running make setup first (a few minutes)"),
        (".venv/.setup-stamp", "the setup of .venv did not finish: running make setup first (a few minutes)"),
        ("models/all-MiniLM-L6-v2", "no models/all-MiniLM-L6-v2 here: running make setup first (a few minutes)"),
    ],
)
def test_make_sets_up_what_is_missing(tmp_path, lost, said):
    lost = checkout(tmp_path) / lost
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert ready(tmp_path) == [said, "called setup"]


@pytest.mark.parametrize("file", ["requirements/cpu.txt", "pyproject.toml"])
def test_make_updates_an_environment_that_is_older_than_its_lock(tmp_path, file):
    os.utime(checkout(tmp_path) / file, (3000, 3000))
    said, called = ready(tmp_path)
    assert said.startswith(f"{file} is newer than .venv: running make setup first") and called == "called setup"
    (tmp_path / ".venv").rename(tmp_path / "elsewhere")
    (tmp_path / ".venv").symlink_to(tmp_path / "elsewhere")
    [said] = ready(tmp_path)  # other checkouts use it too
    assert "not updated here" in said


def commands(*arguments: str) -> list[str]:
    """What make would run, but for `ready.sh`."""
    return [line for line in make("-n", *arguments).stdout.splitlines() if "ready.sh" not in line]


def test_the_main_job_runs_every_stage_once_in_order():
    stages = ("prompts", "sft", "preferences", "rm", "ppo", "bon", "eval", "report")
    expected = [f".venv/bin/grm {stage} --config configs/offline.yaml" for stage in stages]
    assert [line.rstrip() for line in commands("rm", "ppo", "eval")] == expected


def test_the_quick_study_is_a_part_of_the_study():
    (line,) = commands("study-quick", "SET=run.seed=2", "DRY=--dry-run")
    assert line.split()[1:] == [
        "study", "--config", "configs/study.yaml", "--config", "configs/study-quick.yaml", "--dry-run", "run.seed=2"
    ]  # fmt: skip


def test_options_of_make_reach_every_stage():
    found = commands("ppo", "CONFIG=a.yaml", "FROM=runs/offline", "SET=run.name=kl01 ppo.kl.coef=0.1")
    assert found == [
        f".venv/bin/grm {stage} --config a.yaml --from runs/offline run.name=kl01 ppo.kl.coef=0.1"
        for stage in ("prompts", "sft", "preferences", "rm", "ppo")
    ]


def check_files(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "check_files.py", *arguments]
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.py", "x = 1 \n", "spaces at the end of a line"),
        ("a.py", "x = 1", "not one line feed at the end"),
        ("a.md", "text\n\n", "not one line feed at the end"),
        ("a.yaml", "a: [1\n", "cannot be read"),
        ("a.toml", "a = \n", "cannot be read"),
        ("a.json", "{'a': 1}\n", "cannot be read"),
        ("a.bin", "\0" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_files_that_must_not_be_committed(tmp_path, name, content, fault):
    (tmp_path / name).write_text(content)
    done = check_files(tmp_path / name)
    assert done.returncode == 1 and f"{name}: " in done.stderr and fault in done.stderr


def test_ends_of_lines_and_files_are_mended(tmp_path):
    (tmp_path / "a.py").write_text("x = 1 \n\ny = 2\t\n\n\n")
    assert check_files("--fix", tmp_path / "a.py").returncode == 1  # so that a commit stops
    assert (tmp_path / "a.py").read_text() == "x = 1\n\ny = 2\n"
    assert check_files(tmp_path / "a.py").returncode == 0


def test_every_locked_package_has_a_row_in_the_table_of_licences():
    """And the table is of the versions in the lock."""
    page = (ROOT / "docs" / "licences.md").read_text()
    absent = page.partition("Not installed where this was written: ")[2].partition(".\n")[0].split(", ")
    for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            assert f"| {name} | {version}" in page or name in absent, name


def test_prompts_of_pairs_are_whole_and_each_is_there_once(tmp_path):
    rows = [unified(1, i % 2, prompt=f"question {i // 2}") for i in range(20)]  # half of them tie
    rows.append(unified() | {"conv_A": chat("a", "b", "c", "d"), "conv_B": chat("a", "b", "c", "e")})
    write(tmp_path / "pairs.jsonl", *rows)
    command = [sys.executable, "scripts/prompts_of_pairs.py", tmp_path / "pairs.jsonl"]

    def made(*words: str) -> list[list[dict]]:
        subprocess.run([*command, tmp_path / "out.jsonl", *words], cwd=ROOT, check=True, capture_output=True)
        return [json.loads(line)["prompt"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    whole = made()
    assert len(whole) == 11 and chat("a", "b", "c") in whole
    assert made("--number", "4") == whole[:4] and made("--seed", "2") != whole
    failed = subprocess.run([*command[:2], "none.jsonl", "x.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and "none.jsonl" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ("ImportError: libnuma.so.1: cannot open shared object file: No such file", "apt-get install libnuma1"),
        ("ImportError: libodd.so.3: cannot open shared object file: No such file", "no libodd.so.3, which vLLM needs"),
        ("Traceback\nRuntimeError: of another kind", "vLLM cannot be loaded: RuntimeError: of another kind"),
        ("", ""),
    ],
)
def test_setup_names_a_library_that_the_system_lacks(tmp_path, said, refusal):
    """Without it the first stage that samples would fail, minutes after a setup that said nothing."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '{said}' >&2\nexit {1 if said else 0}\n".replace("\nRun", "\\nRun"))
    python.chmod(0o755)
    script = (ROOT / "scripts" / "setup.sh").read_text()
    functions = script[script.index("say() {") : script.index("pick_device() {")]
    functions += script[script.index("check_libraries() {") : script.index("advise_tcmalloc() {")]
    begin = f"set -euo pipefail\nDEVICE=cpu\nVENV_PYTHON={python}\n"
    done = subprocess.run(["bash", "-c", f"{begin}{functions}\ncheck_libraries"], capture_output=True, text=True)
    assert done.returncode == (1 if said else 0) and refusal in done.stderr, done.stderr
