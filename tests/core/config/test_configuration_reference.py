"""docs/configuration.md says what the code says."""

from core.config.explain import reference
from tests.builders.processes import ROOT

RENEW = "python -m core.config.explain > docs/configuration.md"


def test_the_page_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    # Not `page == reference()` alone: pytest would show hundreds of lines, and not the command.
    assert page.splitlines() == reference().splitlines(), f"docs/configuration.md is out of date; renew it: {RENEW}"


def test_the_page_names_the_command_that_renews_it():
    assert f"`{RENEW}`" in reference()
