"""What every file of the repository must be, whatever it holds: `make lint` and the pre-commit hook run it.

    python scripts/check_files.py [--fix] [FILE ...]     without files: all that git tracks

Text ends with one line feed and, but for Markdown, has no spaces at the ends of lines (`--fix` mends both); YAML, TOML
and JSON can be read; no file is larger than 1 MB.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

MOST_BYTES = 1_000_000
PARSERS = {".yaml": yaml.compose, ".yml": yaml.compose, ".toml": tomllib.loads, ".json": json.loads}
"""Suffix -> function that raises an error on a file that cannot be read."""


def tidy(text: str, *, markdown: bool = False) -> str:
    """The text with one line feed at its end, and without spaces at the ends of lines, which mean something in
    Markdown."""
    if not markdown:
        text = re.sub(r"[ \t\r]+$", "", text, flags=re.MULTILINE)
    text = text.rstrip("\n")
    return text + "\n" if text else ""


def faults(file: Path, *, fix: bool) -> list[str]:
    content = file.read_bytes()
    found = [f"larger than {MOST_BYTES:,} bytes"] if len(content) > MOST_BYTES else []
    if b"\0" in content:
        return found
    text = content.decode()
    tidied = tidy(text, markdown=file.suffix == ".md")
    if tidied != text:
        found.append("spaces at the end of a line, or not one line feed at the end" + (": mended" if fix else ""))
        if fix:
            file.write_text(tidied, encoding="utf-8")
    try:
        PARSERS.get(file.suffix, str)(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        found.append(f"cannot be read: {error}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--fix", action="store_true", help="mend spaces and line feeds at ends")
    options = parser.parse_args(arguments)
    tracked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = options.files or [
        Path(name) for name in subprocess.check_output(tracked, text=True).split("\0") if Path(name).is_file()
    ]
    found = [f"{file}: {fault}" for file in files for fault in faults(file, fix=options.fix)]
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
