"""What the documentation names exists: linked pages, files, options, functions, one version."""

from __future__ import annotations

import contextlib
import importlib
import re
import tomllib
import typing

import pytest
import yaml
from pydantic import BaseModel

from core.config import Config
from pipelines.command_line import COMMANDS
from tests.builders.pages import PACKAGES, PAGES, ROOT, Block, blocks, inline


def without_theirs(block: Block) -> Block:
    """A block of docs/migration.md without the first cells of its tables, in which other projects' options stand."""
    if block.page.name != "migration.md":
        return block
    return block._replace(text=re.sub(r"(?m)^\| [^|]*\|", "| |", block.text))


PROSE = [without_theirs(block) for page in PAGES for block in blocks(page) if block.language == "prose"]
FILE = re.compile(r"[\w.\-/]+\.(?:py|yaml|sh|toml|cff|j2)|(?:docs|data|configs|requirements|tests)/[\w.\-/]+")
FOLDER = re.compile(r"(?:core|pipelines|study|tests|docs|configs|scripts|benchmarks|experiments)/[\w/]*")
"""Folders of the repository that no run has too."""
DOTTED = re.compile(rf"(?:{'|'.join([*PACKAGES, *Config.model_fields])})(?:\.[\w*]+)+")
OUTPUTS = re.compile(r".*\.(?:html|md|json|csv|yaml|py|parquet|partial)")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = "\n".join(block.text for block in blocks(page) if block.language == "prose")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


def test_files_that_are_named_exist():
    folders = [path for path in ROOT.iterdir() if path.name not in {".venv", ".git", "runs"} and path.is_dir()]
    names = {path.name for found in (ROOT.iterdir(), *(f.rglob("*.*") for f in folders)) for path in found}
    missing = [
        f"{where}: {code}"
        for block in PROSE
        for where, code in inline(block)
        if (FILE.fullmatch(code) or FOLDER.fullmatch(code)) and not code.startswith("runs/")
        if not (code in names or (ROOT / code).exists() or (block.page.parent / code).exists())
    ]
    assert not missing


def is_option(path: str) -> bool:
    """Whether the configuration has the section or field `path`; the name of a mapping's entry may be any."""
    kind: typing.Any = Config
    for part in path.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            continue
        sections = [k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
        if not sections or part not in sections[0].model_fields:
            return False
        kind = sections[0].model_fields[part].annotation
    return True


def is_code(path: str) -> bool:
    """Whether `path` is a module of the project, or something that a module has."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                fields = getattr(found, "__annotations__", {})
                if not hasattr(found, part) and part not in fields:
                    return False
                found = getattr(found, part, fields.get(part))
            return True
    return False


def test_options_and_functions_that_are_named_exist():
    unknown = []
    for block in PROSE:
        for where, code in inline(block):
            name = re.split(r"[=(:]", code)[0]
            if DOTTED.fullmatch(name) and not OUTPUTS.fullmatch(name) and not (is_option(name) or is_code(name)):
                unknown.append(f"{where}: {code}")
    assert not unknown


def test_our_column_of_the_migration_page_has_options_and_commands_only():
    """Each of the second cells of its tables names options of the configuration, or commands of `grm`."""
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| ([^|]*)\| ([^|]*)\| ([^|]*)\|$", page)
    ours = [code for _, cell, _ in rows for code in re.findall(r"`([^`]*)`", cell)]
    assert len(ours) > 200
    assert not [code for code in ours if not is_option(code.partition("=")[0]) and not is_command(code)]
    assert not is_option("ppo.kl.coeff") and not is_command("grm ppoo")


def is_command(words: str) -> bool:
    program, _, name = words.partition(" ")
    return program == "grm" and name in COMMANDS


@pytest.mark.parametrize("name", ["ppo.kl.coeff", "rm.variants.grm.heads", "rm.losses.bradley", "core.nothing"])
def test_a_name_that_is_not_there_is_noticed(name):
    assert DOTTED.fullmatch(name) and not is_option(name) and not is_code(name)


def test_the_map_has_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(\.\./([\w/]+\.py)\)", page))
    files = {str(file.relative_to(ROOT)) for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    there = {name for name in files if not name.endswith("__init__.py")}
    assert not there - named, "not on the map of docs/architecture.md"
    assert not named - there, "on the map of docs/architecture.md, but not there"


def test_the_contents_list_every_page():
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert not [name for name in pages if f"({name})" not in contents]


def test_there_is_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    released = re.findall(r"(?m)^## \[(\d[\w.]*)\]", (ROOT / "CHANGELOG.md").read_text())
    assert released[0] == version
