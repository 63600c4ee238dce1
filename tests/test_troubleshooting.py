"""docs/troubleshooting.md quotes what the program says."""

import re

from tests.builders.pages import PACKAGES, ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.compile(r'"([^"]+)"')


def sources() -> str:
    """The code, with adjacent strings joined as Python joins them."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in [*files, ROOT / "scripts" / "setup.sh"])
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_messages_are_those_of_the_code():
    section = PAGE.partition("## By symptom")[2].partition("\n## ")[0]
    quoted = [" ".join(text.split()) for text in QUOTED.findall(section)]
    code = sources()
    missing = [text for text in quoted for part in text.split("...") if part.strip() not in code]
    assert len(quoted) > 20 and not missing
