"""The licences of all packages that `make setup` installs, as their own metadata tell them.

python scripts/licences.py > docs/licences.md     in the environment of the project
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements" / "cpu.txt"
LONGEST = 60
"""Characters of a licence in the table: some packages have its whole text in their metadata."""
UNKNOWN = "not told"
OTHERS = rf"GPL|MPL|EUPL|Mozilla|Proprietary|{UNKNOWN}"
HEADING = """# Licences of dependencies

What `requirements/cpu.txt` installs, and the licence that each package tells in its own metadata (`License-Expression`,
else its classifiers, else `License`). Written by `make licences`, which knows no more than that: packages may contain
parts under other licences, and a package that is installed on a GPU machine only is not here.
"""


def names(requirements: Path = REQUIREMENTS) -> list[str]:
    """The packages of a file of pinned requirements."""
    found = [re.match(r"[A-Za-z0-9._-]+", line.strip()) for line in requirements.read_text().splitlines()]
    return sorted({match[0] for match in found if match}, key=str.lower)


def licence(package: importlib.metadata.PackageMetadata) -> str:
    """As the metadata tell it, in one line."""
    if expression := package.get("License-Expression"):
        return expression
    told = [c.split(" :: ")[-1] for c in package.get_all("Classifier") or () if c.startswith("License :: ")]
    told = [name for name in told if name != "OSI Approved"]
    if told:
        return ", ".join(dict.fromkeys(told))
    first = next((line.strip() for line in (package.get("License") or "").splitlines() if line.strip()), "")
    return first[:LONGEST] if first and first.upper() != "UNKNOWN" else UNKNOWN


def page() -> str:
    rows, absent = [], []
    for name in names():
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        rows.append((name, about["Version"], licence(about).replace("|", "/")))
    others = [f"{name} ({told})" for name, _, told in rows if re.search(OTHERS, told)]
    lines = [HEADING, f"{len(rows)} packages. Those that are not permissive alone, or say nothing clear:", ""]
    lines += [f"- {other}" for other in others] + [""]
    if absent:
        lines += [f"Not installed where this was written: {', '.join(absent)}.", ""]
    lines += ["| package | version | licence |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {version} | {told} |" for name, version, told in rows)])


if __name__ == "__main__":
    print(page())
    sys.exit(0)
