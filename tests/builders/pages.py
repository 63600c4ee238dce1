"""The pages of the documentation, cut into prose, blocks of code and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("core", "rm", "sft", "bon", "ppo", "pipelines", "study", "experiments", "benchmarks")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
RUNNABLE = r"(?:[A-Z_]+=\S+ )*(?:srun )?(?:make|grm|torchrun|python -m|python scripts/\S+|\.venv/bin/\S+) "
PLACEHOLDERS = {"STAGE": "rm", "F": "configs/offline.yaml", "FILE": "configs/offline.yaml"}
"""Words of a synopsis -> an example."""


class Block(NamedTuple):
    page: Path
    line: int
    """Of its first line of text, from 1."""
    language: str
    """What stands behind the opening fence; `prose` for the text between fenced blocks."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where} {self.text}"


def blocks(page: Path) -> Iterator[Block]:
    """The page from top to bottom."""
    language, start, lines = "prose", 1, []
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), "```"], start=1):
        if line.startswith("```"):
            yield Block(page, start, language, "\n".join(lines))
            language, start, lines = line[3:].strip() if language == "prose" else "prose", number + 1, []
        else:
            lines.append(line)


def inline(block: Block) -> Iterator[tuple[str, str]]:
    """(page:line, code) of the `code` in lines of prose."""
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        yield from ((f"{block.page.relative_to(ROOT)}:{number}", code) for code in re.findall(r"`([^`]+)`", line))


def commands() -> Iterator[Command]:
    """Lines of shell, and inline code, that begin as a command of this project does."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "prose":
                yield from (Command(*found) for found in inline(block) if re.match(RUNNABLE, found[1]))
            elif block.language in ("", "bash", "sh"):
                lines = block.text.replace("\\\n", " ").splitlines()
                lines = [re.sub(r"\s+#.*", "", line) for line in lines]
                yield from (Command(str(block), line) for line in lines if re.match(RUNNABLE, line + " "))


def words_of(text: str) -> list[str]:
    """The first command of a line as words, without shell variables and what a synopsis leaves open (`[a.b=v ...]`)."""
    text = re.sub(r"\s\[a\.b=[^\]]*\]", "", text)
    words = shlex.split(re.sub(r"\s\[(-[^\]]*)\]", r" \1", text), comments=True)
    words = [word for word in words if word != "..."]
    ends = [i for i, word in enumerate(words) if word in (">", "|", "&&")]
    words = words[: min(ends, default=len(words))]
    while re.fullmatch(r"[A-Z_]+=.*|srun", words[0]):
        words = words[1:]
    return [PLACEHOLDERS.get(word, word.replace("=...", "=configs/offline.yaml")) for word in words]
