"""Functions of the user's own, named as `module:function`."""

import sys

import pytest

from core.errors import ConfigError
from core.functions import load_function, source_file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, in which modules are written; what they leave in Python is taken away again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_of_the_current_folder_is_found_without_running_it(folder):
    (folder / "my_rewards.py").write_text("raise SystemExit('it ran')\n")
    (folder / "mine").mkdir()
    (folder / "mine" / "inner.py").write_text("def f():\n    return 3\n")
    assert source_file("x", "my_rewards:f") == folder / "my_rewards.py"
    assert load_function("x", "mine.inner:f")() == 3


def test_the_current_folder_comes_first(folder, monkeypatch):
    other = folder / "elsewhere"
    other.mkdir()
    (other / "some_rewards.py").write_text("def f():\n    return 'elsewhere'\n")
    monkeypatch.syspath_prepend(other)
    assert load_function("x", "some_rewards:f")() == "elsewhere"
    del sys.modules["some_rewards"]
    (folder / "some_rewards.py").write_text("def f():\n    return 'here'\n")
    assert source_file("x", "some_rewards:f") == folder / "some_rewards.py"
    sys.path.remove(str(other))
    assert load_function("x", "some_rewards:f")() == "here"


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "my_absent:f", r"ppo\.own: no module 'my_absent': my_absent\.py is neither in the current folder"),
        ("def g():\n    pass\nh = 3\n", "my_functions:f", r"my_functions\.py has no function 'f'; it has g"),
        ("h = 3\n", "my_functions:h", r"has no function 'h'; it has none"),
        ("import not_there_at_all\n", "my_functions:f", r"cannot be imported: ModuleNotFoundError: .*not_there_at_all"),
        ("def f(:\n", "my_functions:f", r"my_functions\.py cannot be imported: SyntaxError"),
    ],
)
def test_what_cannot_be_found_is_named(folder, source, name, message):
    if source:
        (folder / "my_functions.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_function("ppo.own", name)


def test_a_name_that_python_has_already_is_refused(folder):
    """Python would give its own module, and not the user's."""
    (folder / "json.py").write_text("def f():\n    return 1\n")
    with pytest.raises(ConfigError, match=r"'json' is the name of another module of Python: rename json\.py"):
        load_function("x", "json:f")
