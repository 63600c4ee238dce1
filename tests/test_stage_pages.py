"""docs/stages/ says what the code says."""

import runpy

import pytest

from pipelines.stages import STAGES
from tests.builders.processes import ROOT

PAGES = ROOT / "docs" / "stages"
MADE = runpy.run_path(str(ROOT / "scripts" / "stage_pages.py"))


@pytest.mark.parametrize("name", [page.stem for page in PAGES.glob("*.md") if page.stem in STAGES])
def test_the_tables_of_a_page_are_current(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert page.count("<!-- facts -->") == page.count("<!-- options -->") == 1
    assert page.splitlines() == MADE["renewed"](name, page).splitlines(), "out of date; renew it: make docs-config"


def test_every_stage_has_a_page():
    pages = {page.stem for page in [*PAGES.glob("*.md"), *PAGES.parent.glob("*.md")]}
    assert set(STAGES) <= pages


def test_a_table_has_what_no_other_stage_reads():
    made = MADE["options"](STAGES["ppo"])
    assert "| `ppo.kl.coef` | `0.05` |" in made and "`generation" in made and "| `generation" not in made
    assert MADE["link"]("run.seed") == "../configuration.md#run"
