"""Hooks of MkDocs: the pages that GitHub shows become a site, without a word changed in them.

- README.md, CONTRIBUTING.md, CHANGELOG.md and the pages of benchmarks/ lie outside docs/ and become pages too.
- A link to a file of the code leads to a page with that file: under `source/`, outside navigation and search.
- A list or table that follows a line of text, and lists in lists, are spaced as Python-Markdown wants them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "docs/README.md": "contents.md", "CONTRIBUTING.md": "contributing.md",
         "CHANGELOG.md": "changelog.md"}  # fmt: skip
"""File of the repository -> its page, where that is not the path within docs/, or the path itself."""
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".json": "json", ".sh": "bash", "": "make"}
LARGEST = 100_000
"""Bytes of a file that is shown."""


def site_path(file: str) -> str:
    """The page of a file of the repository."""
    if file in MOVED:
        return MOVED[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return file if file.endswith(".md") else f"source/{file}.md"


def sources() -> list[str]:
    """All Markdown files that become pages, as paths in the repository."""
    files = [ROOT / name for name in MOVED]
    files += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    return sorted({file.relative_to(ROOT).as_posix() for file in files})


def target(link: str, origin: str) -> str | None:
    """The file of the repository that a link of the page `origin` leads to; None for another site."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with every line changed that is in no fenced block."""
    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        lines.append(line if fenced or line.startswith("```") else change(line))
    return "\n".join(lines)


def linked(text: str, origin: str) -> Iterator[str]:
    """Files of the repository that a page links to and that are no pages."""
    found: list[str] = []
    outside_code(text, lambda line: found.extend(m[2] for m in LINK.finditer(line)) or line)
    for link in found:
        file = target(link, origin)
        if file and (ROOT / file).is_file() and not file.endswith((".md", ".png")):
            yield file


def for_site(text: str, origin: str) -> str:
    """A page of the repository as Python-Markdown and the site want it."""
    here = posixpath.dirname(site_path(origin))

    def moved(found: re.Match[str]) -> str:
        file = target(found[2], origin)
        if file is None:
            return found[0]
        return f"{found[1]}{posixpath.relpath(site_path(file), here or '.')}{found[3] or ''}{found[4]}"

    before = ""

    def spaced(line: str) -> str:
        nonlocal before
        item = re.match(r"( *)(?:[-*]|\d+\.) ", line)
        if item and item[1]:
            line = item[1] + line  # four spaces begin a list in a list
        begins = bool(item) and not re.match(r"( *(?:[-*]|\d+\.) |  )", before)
        begins |= line.startswith("|") and not before.startswith("|")
        apart = "\n" if begins and before.strip() else ""
        before = line
        return apart + LINK.sub(moved, line)

    return outside_code(text, spaced)


def shown(file: str) -> str:
    """A page with a file of the code."""
    content = (ROOT / file).read_text(encoding="utf-8")
    if len(content) > LARGEST:
        content = content[:LARGEST] + "\n..."
    language = LANGUAGES.get(Path(file).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {file}\n\n``````{language}\n{content}\n``````\n"


def on_config(config):
    from pymdownx.slugs import slugify
    from pymdownx.superfences import fence_code_format

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")  # the anchors of GitHub
    diagram = {"name": "mermaid", "class": "mermaid", "format": fence_code_format}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [diagram]
    return config


def on_files(files, *, config):
    from mkdocs.structure.files import File

    contents = {site_path(name): for_site((ROOT / name).read_text(encoding="utf-8"), name) for name in sources()}
    code = {file for name in sources() for file in linked((ROOT / name).read_text(encoding="utf-8"), name)}
    contents |= {site_path(file): shown(file) for file in code}
    for file in [file for file in files if file.src_uri.endswith(".md")]:
        files.remove(file)
    contents["site.css"] = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    for page, content in contents.items():
        files.append(File.generated(config, page, content=content))
    return files
