"""The numbers that README.md and benchmarks/results.md show are those of benchmarks/results.json."""

from benchmarks import page, readme, records
from tests.builders.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results.json"


def test_readme_has_the_numbers_of_the_json():
    assert readme.written((ROOT / "README.md").read_text()) == readme.section(records.read(RESULTS))


def test_the_table_is_that_of_the_json():
    assert RESULTS.with_suffix(".md").read_text() == page.markdown(records.read(RESULTS))
