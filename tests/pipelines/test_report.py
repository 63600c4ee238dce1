"""The report's page on made-up results: self-contained, escaped, with the numbers in it."""

import re

import pytest

from core import plotting
from pipelines import report_figures as figures
from pipelines.report import checkpoint_table, markdown, render, reward_table

EVIL = "<script>alert(1)</script>"


def curves():
    return [
        {"rm": rm, "method": method, "metric": metric, "x": x, "d": x / 4, "mean": x / 5, "lo": x / 5 - 0.1,
         "hi": x / 5 + 0.1}
        for rm, method in (("grm", "bon"), ("bt", "bon"), ("grm", "ppo"))
        for metric in ("proxy", "gold")
        for x in range(4)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    interval = {"mean": 0.71, "lo": 0.62, "hi": 0.79, "n": 180}
    variants = {
        "grm": {"accuracy_gold": interval, "accuracy_label": interval, "length_correlation": 0.2, "seconds": 61.0}
    }
    steps = [{"step": s, "proxy_mean": 0.1, "proxy_se": 0.1, "kl_nats_per_response": 0.5 * s} for s in (1, 2)]
    drawn = {
        "overoptimisation": figures.overoptimisation(curves()),
        "accuracy": figures.accuracy(variants, "gold", 0.55),
        "reward_training": figures.reward_training({"grm": [{"step": 1, "reward_loss": 0.7, "accuracy": 0.5}]}),
        "ppo_training": figures.ppo_training(steps),
    }
    rows = [
        {"step": s, "kl": 0.3 * s, "kl_se": 0.01, "tokens": 40.0, "eos_rate": 0.25, "prompts": 128,
         **{f"{m}{e}": 0.123 * s for m in ("proxy", "gold") for e in ("", "_lo", "_hi")}}
        for s in (0, 4)
    ]  # fmt: skip
    side = {"label": "step 4", "proxy": "+1.00", "gold": "-1.00", "kl": "3.1", "response": EVIL}
    check = {"name": "at least 3 seeds", "ok": False, "detail": "one"}
    return {
        "run": "unit", "asked": "A policy.", "verdicts": [EVIL],
        "failed": [check], "num_checks": 1, "all_checks": [check],
        "figures": {name: plotting.save(figure, out, name) for name, figure in drawn.items()},
        "table": checkpoint_table(rows), "rm_table": reward_table(variants, "gold"),
        "samples": [{"prompt": EVIL, "before": side, "after": side}],
        "stages": [{"stage": "rm", "seconds": 9, "headline": "x"}], "config": "a: 1", "packages": "torch: 2",
    }  # fmt: skip


def test_page_is_self_contained_and_escaped(page):
    html = render(page)
    assert EVIL not in html and html.count("&lt;script&gt;alert(1)") == 4
    assert html.count("<svg") == 4
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html.replace("xmlns:xlink", ""))
    for number in ("0.71", "[0.620, 0.790]", "+0.49 [+0.49, +0.49]", "1.20 ± 0.01", "Checks that failed: 1 of 1"):
        assert number in html


def test_markdown_has_the_same_tables(page):
    text = markdown(page)
    assert "| 4 | 1.20 ± 0.01 | +0.49 [+0.49, +0.49] |" in text and "check failed: at least 3 seeds (one)" in text


def test_figures_are_the_same_twice(tmp_path):
    first, second = (plotting.save(figures.overoptimisation(curves()), tmp_path, "f") for _ in range(2))
    assert first == second and (tmp_path / "f.png").stat().st_size > 10_000
