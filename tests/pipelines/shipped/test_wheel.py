"""The wheel, as somebody has it who has no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from core.files import read_table
from tests.builders.processes import ROOT

SOURCES = ("core", "rm", "sft", "bon", "ppo", "pipelines", "study", "configs", "data", "examples")
WHERE = """
import bon, core, pipelines, ppo, rm, sft, study
print(*(package.__file__ for package in (bon, core, pipelines, ppo, rm, sft, study)))
"""


def run(*command: object, cwd: Path) -> str:
    """Stdout and stderr of a command that knows nothing of the checkout."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment with the wheel, and with the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder / "source", cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    python = folder / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    # A line of a .pth file is a folder whose own .pth files are not read: not that of the editable install either.
    (Path(purelib) / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "env"


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(environment, policy_path, tmp_path):
    grm, python = environment / "bin" / "grm", environment / "bin" / "python"
    assert all(file.startswith(str(environment)) for file in run(python, "-c", WHERE, cwd=tmp_path).split())
    assert "make rm ppo eval" in run(grm, "init", "mine", cwd=tmp_path)
    mine = tmp_path / "mine"
    assert (mine / "configs" / "offline.yaml").read_bytes() == (ROOT / "configs" / "offline.yaml").read_bytes()
    assert "name: offline" in run(grm, "config", cwd=mine)
    (mine / "models").symlink_to(policy_path.parent)
    assert "prompts" in run("make", "prompts", f"GRM={grm}", cwd=mine)
    assert len(read_table(mine / "runs" / "offline" / "prompts" / "prompts.parquet")) > 1000
    assert "up to date" in run("make", "status", f"GRM={grm}", cwd=mine)


@pytest.mark.slow
def test_the_wheel_has_every_file_that_the_code_reads(environment):
    """All that git tracks of the packages and of what is shipped, at its place in the environment."""
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    (packages,) = environment.glob("lib/python3*/site-packages")
    names = [name for name in tracked.stdout.splitlines() if not (ROOT / name).is_symlink() and (ROOT / name).exists()]
    places = [packages / ("pipelines/shipped" if name.startswith(SOURCES[-3:]) else "") / name for name in names]
    assert len(places) > 200 and not [str(place) for place in places if not place.is_file()]
