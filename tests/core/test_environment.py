"""The environment that a stage gets."""

import os
import subprocess
import sys

from core.environment import may_be_written, preloaded, variables


def test_a_library_in_a_folder_with_a_space_is_loaded_before_others(tmp_path, monkeypatch):
    """As the OpenMP of a checkout in such a folder is."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "odd.c").write_text("int answer_of_an_odd_place(void) { return 42; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libodd.so", folder / "odd.c"], check=True)
    program = "import ctypes; print(ctypes.CDLL(None).answer_of_an_odd_place())"
    env = {**os.environ, **preloaded([str(folder / "libodd.so")])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("42\n", "")


def test_libraries_elsewhere_are_named_with_their_folders(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/mine.so")
    assert preloaded(["/a/x.so"]) == {"LD_PRELOAD": "/a/x.so:/mine.so"}
    monkeypatch.delenv("LD_PRELOAD")
    assert preloaded([]) == {}


def test_the_cache_of_vllm_is_elsewhere_where_the_home_cannot_be_written(tmp_path, monkeypatch):
    for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "VLLM_CACHE_ROOT" not in variables(1)
    monkeypatch.setenv("HOME", "/proc/1/nothing")  # no process can write there, root neither
    assert may_be_written(tmp_path / "not" / "there") and "VLLM_CACHE_ROOT" in variables(1)
