"""The structure that docs/architecture.md promises: who imports whom, no circles, no crowded folders."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.builders.processes import ROOT

LEVELS = {
    "core": 0,
    "rm": 1,
    "sft": 1,
    "bon": 2,
    "ppo": 2,
    "pipelines": 3,
    "study": 4,
    "experiments": 5,
    "benchmarks": 5,
}
"""A package imports from lower levels, and from itself."""
HEAVY = {"vllm": "core/generation", "deepspeed": "core/training"}
"""Library -> the only folder that imports it."""
MOST_FILES = 20


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of all packages."""
    files = [f for package in LEVELS for f in sorted((root / package).rglob("*.py"))]
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions too; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def graph(root: Path) -> dict[str, dict[str, int]]:
    """Module -> the modules of this project that it imports, with the line."""
    known, found = modules(root), {}
    for name, file in known.items():
        found[name] = {}
        for line, target in imports(file):
            target = target if target in known else target.rpartition(".")[0]
            if target in known and target != name:
                found[name].setdefault(target, line)
    return found


def wrong_directions(root: Path) -> list[str]:
    level = lambda module: LEVELS[module.partition(".")[0]]  # noqa: E731
    top = lambda module: module.partition(".")[0]  # noqa: E731
    return [
        f"{name}, line {line}: {top(name)} must not import {target}"
        for name, targets in graph(root).items()
        for target, line in targets.items()
        if level(target) >= level(name) and top(target) != top(name)
    ]


def circle(edges: dict[str, dict[str, int]]) -> list[str]:
    """The modules of one circle of imports, its first one last again; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in edges[name]:
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in edges if (found := visit(name, []))), [])


def test_imports_go_one_way():
    assert not wrong_directions(ROOT)


def test_tests_lie_as_the_code_does():
    """A test imports no package to the right of its own; tests/builders may import all of them."""
    wrong = [
        f"{file.relative_to(ROOT)}, line {line}: {target}"
        for package, level in LEVELS.items()
        for file in (ROOT / "tests" / package).rglob("test_*.py")
        for line, target in imports(file)
        if (top := target.partition(".")[0]) != package and LEVELS.get(top, -1) >= level
    ]
    assert not wrong


def test_imports_go_in_no_circle():
    assert not circle(graph(ROOT)), " -> ".join(circle(graph(ROOT)))


def test_a_wrong_import_is_found_by_name(tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "rm").mkdir()
    (tmp_path / "core" / "a.py").write_text("def f():\n    from rm import b\n")
    (tmp_path / "rm" / "b.py").write_text("import core.a\n")
    assert wrong_directions(tmp_path) == ["core.a, line 2: core must not import rm.b"]
    assert circle(graph(tmp_path)) == ["core.a", "rm.b", "core.a"]


def test_heavy_libraries_have_one_folder():
    found = [
        f"{file.relative_to(ROOT)}, line {line}: {name}"
        for file in modules(ROOT).values()
        for line, name in imports(file)
        if (home := HEAVY.get(name.partition(".")[0])) and not file.is_relative_to(ROOT / home)
    ]
    assert not found


def test_no_folder_is_crowded():
    folders: dict[Path, int] = {}
    for file in [*modules(ROOT).values(), *(ROOT / "tests").rglob("*.py")]:
        folders[file.parent] = folders.get(file.parent, 0) + (file.name != "__init__.py")
    assert not {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > MOST_FILES}


def test_no_test_imports_from_another_test():
    """What several tests need is in tests/builders."""
    imported = [
        f"{file.relative_to(ROOT)}, line {line}: {name}"
        for file in (ROOT / "tests").rglob("*.py")
        for line, name in imports(file)
        if name.startswith("tests.") and any(part.startswith(("test_", "conftest")) for part in name.split(".")[:-1])
    ]
    assert not imported


def test_every_marker_is_carried_by_a_test():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    declared = {marker.partition(":")[0] for marker in options["markers"]}
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert declared == {name for name in declared if re.search(rf"\bpytest\.mark\.{name}\b", tests)}
