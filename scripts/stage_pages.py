"""The parts of docs/stages/*.md that follow from the code: what a stage reads and writes, and its options.

`python scripts/stage_pages.py` writes them, between the marks `<!-- facts -->` or `<!-- options -->` and `<!-- end -->`
of each page; `make docs-config` calls it. The text around them is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from core.config.explain import shown
from core.config.fields import all_fields
from pipelines.command_line import first_sentence
from pipelines.stages import STAGES, Stage

PAGES = Path(__file__).resolve().parents[1] / "docs" / "stages"
PART = re.compile(r"(<!-- (facts|options) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(name: str, text: str) -> str:
    """The page of a stage with its parts as they are now."""
    parts = {"facts": facts(STAGES[name]), "options": options(STAGES[name])}
    return PART.sub(lambda found: found[1] + parts[found[2]] + found[3], text)


def facts(stage: Stage) -> str:
    rows = [
        ("reads", ", ".join(f"[{name}]({name}.md)" for name in stage.inputs) or "no other stage"),
        ("reads from outside", ", ".join(f"`{field}`" for field in (*stage.files, *stage.functions)) or "nothing"),
        ("writes", f"`runs/<name>/{stage.name}/`: {stage.makes}"),
        ("processes", processes(stage)),
        ("command", f"`make {stage.name}`, which runs what it needs first, or `grm {stage.name}` alone"),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows)]) + "\n"


def processes(stage: Stage) -> str:
    if stage.distributed:
        return "`engine.processes` ranks, which train together"
    if stage.divided:
        return "`generation.processes` processes, which divide the work"
    return "one"


def options(stage: Stage) -> str:
    """Tables of the sections that no other stage reads, and links to those that others read too."""
    own = [section for section in stage.reads if "." not in section and readers(section) == [stage.name]]
    lines: list[str] = []
    for section in own:
        lines += [*table(section), ""]
    shared = [f"[`{section}`]({link(section)})" for section in stage.reads if section not in own]
    if shared:
        lines.append(f"{'Its result depends on' if not own else 'It also depends on'} {', '.join(shared)}.")
    return "\n".join(lines).rstrip() + "\n"


def readers(section: str) -> list[str]:
    return [stage.name for stage in STAGES.values() if section in stage.reads]


def link(key: str) -> str:
    """Where docs/configuration.md has a section, or the section of an option."""
    sections = [field.key for field in all_fields() if field.sections]
    section = key if key in sections else key.rpartition(".")[0]
    return f"../configuration.md#{re.sub(r'[^a-z_]', '', section)}"


def table(section: str) -> Iterator[str]:
    yield from ("| option | default | |", "| --- | --- | --- |")
    for field in all_fields():
        if field.key.startswith(section + ".") and not field.sections:
            cells = (f"`{field.key}`", f"`{shown(field.default)}`", first_sentence(field.explanation) + ".")
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    for page in PAGES.glob("*.md"):
        if page.stem in STAGES:
            page.write_text(renewed(page.stem, page.read_text(encoding="utf-8")), encoding="utf-8")
