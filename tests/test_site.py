"""The site of the documentation: every page is in its navigation, and links of the repository become links of the site.

Whether all links of the built site lead somewhere, `make docs` says.
"""

import runpy

import yaml

from tests.builders.pages import ROOT

SITE = runpy.run_path(str(ROOT / "scripts" / "site.py"))


def leaves(tree: object) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


def test_every_page_is_in_the_navigation_once():
    nav = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(map(SITE["site_path"], SITE["sources"]()))


def test_links_lead_to_pages_of_the_site():
    text = "[a](../README.md#x) [b](../rm/gold.py) [c](../benchmarks/results.md) [d](plan.md) [e](https://x.org/a)\n"
    text += "[f](README.md) [g](stages/README.md) [h](images/a.png) [i](#here)\n```\n[j](../rm/gold.py)\n```"
    assert SITE["for_site"](text, "docs/scale.md").splitlines() == [
        "[a](index.md#x) [b](source/rm/gold.py.md) [c](benchmarks/results.md) [d](plan.md) [e](https://x.org/a)",
        "[f](contents.md) [g](stages/README.md) [h](images/a.png) [i](#here)",
        "```", "[j](../rm/gold.py)", "```",
    ]  # fmt: skip
    assert (
        SITE["for_site"]("[a](../../README.md) [b](../ppo.md)", "docs/stages/rm.md")
        == "[a](../index.md) [b](../ppo.md)"
    )
    assert SITE["for_site"]("[a](docs/ppo.md)", "README.md") == "[a](ppo.md)"
    assert list(SITE["linked"](text, "docs/scale.md")) == ["rm/gold.py"]


def test_lists_and_tables_begin_as_python_markdown_wants_them():
    text = "Two:\n- one\n  - inner\n  goes on\n- two\n\nA table:\n| a | b |\n| --- | --- |"
    assert SITE["for_site"](text, "docs/a.md") == (
        "Two:\n\n- one\n    - inner\n  goes on\n- two\n\nA table:\n\n| a | b |\n| --- | --- |"
    )
