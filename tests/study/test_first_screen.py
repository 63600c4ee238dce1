"""The first screen of a study's page, and figures that can be read: on dark pages, by ear, side by side."""

import re
from dataclasses import replace

import numpy as np
import pytest

from core import plotting
from study import checks as check
from study.analysis.bootstrap import Interval
from study.analysis.verdict import CANNOT_CONCLUDE
from study.report import page
from study.report.answers import answers
from study.report.figures import all_figures
from study.report.overoptimisation import ensembles, overoptimisation
from tests.builders.browser import dom, needs_browser
from tests.builders.studies.whole import many_cells, two_methods

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two():
    return two_methods()


@pytest.fixture(scope="module")
def many():
    return many_cells()


@pytest.fixture(scope="module")
def html(two, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    page.write(out, "two", "What was asked?", two, [check.aligned(two), *check.enough(two, {"a": None}, 3)])
    return out / "study.html"


def test_it_says_what_turns_and_when_with_the_numbers_of_the_tables(two):
    said = answers(two, [])
    bt = two.pooled["bt-128pairs-12layers-noise0.25-kl0"]
    first = next(s for s in said.turns if s.startswith("PPO against bt (3 seeds)"))
    assert first == (
        f"PPO against bt (3 seeds): gold peaked at a KL of {bt['peak_kl'].mean:.1f} nats and fell by "
        f"{bt['drop'].mean:.2f} SD [{bt['drop'].lo:.2f}, {bt['drop'].hi:.2f}] by a KL of {bt['kl']:.1f} nats, while "
        f"the proxy still rose (by {bt['proxy_since_peak'].mean:.2f}); 3 of 3 policies turn by themselves."
    )
    assert any("the min of 3 bt" in s for s in said.turns)
    quiet = next(s for s in said.turns if s.startswith("Best-of-n by bt, grm, and 6 ensembles: gold did not turn"))
    assert "up to n = 64 (KL 3.2 nats)" in quiet


def test_it_says_who_is_better_or_that_they_are_not_told_apart(two):
    f = two.policy_differences[0]
    (first, *_) = answers(two, []).better
    gap = f["at_equal_kl"]
    assert first == (
        f"PPO at equal KL (3 seeds): grm and bt are not told apart: {gap} SD ({f['kl']:.0f} nats). Less than "
        f"{gap.half_width:.2f} would not show."
    )
    clear = [{**f, "at_equal_kl": Interval(0.3, 0.1, 0.5), "p_holm": p} for p in (0.01, 0.2)]
    told = answers(replace(two, policy_differences=clear), []).better
    assert told[0].startswith("PPO at equal KL (3 seeds): grm gives more gold than bt: +0.30 [+0.10, +0.50] SD")
    assert "grm perhaps gives more gold than bt (not clear among so many comparisons)" in told[1]


def test_it_says_whether_a_penalty_does_more_than_stop_early(many):
    said = [s for s in answers(many, []).better if "KL coefficient 0.05 and KL coefficient 0 are not told apart" in s]
    assert len(said) == 1 and "(bt, 128 pairs, 25% wrong labels, " in said[0] and "nats)" in said[0]


def test_it_says_what_it_cannot_tell(two, many):
    failed = check.Check("at least 500 prompts", False, "80")
    said = answers(two, [failed, check.Check("fine", True, "")]).unknown
    undecided = [n for n, f in two.pooled.items() if f["verdict"].kind == CANNOT_CONCLUDE]
    assert undecided == ["grm-128pairs-12layers-noise0.25-kl0"] and said[0].startswith(
        "PPO against grm (3 seeds): the drop"
    )
    assert "Checks that failed: 1 of 2: at least 500 prompts (80)." in said
    assert "Whether another gold would agree: there is one." in said
    assert "Whether PPO with other seeds would: there are 2 policies a condition." in answers(many, []).unknown
    assert len(said) < 9 and all(len(s) < 400 for s in said)


def test_what_other_tools_chose_among_the_first_n_is_not_called_ppo(two):
    curves = [replace(c, kl_kind="bound") for c in two.curves]
    said = answers(replace(two, curves=curves), [])
    every = " ".join((*said.turns, *said.better, *said.unknown))
    assert "Best of the first n by bt (3 seeds): gold peaked" in every and "PPO" not in every
    titles = [a.get_title() for a in overoptimisation(replace(two, curves=curves)).axes]
    assert "Best of the first n (KL: an upper bound)" in titles


def test_one_policy_is_not_spoken_of_as_a_method(two):
    """With one seed the policy's own verdict is told, as that of one seed."""
    name = "bt-128pairs-12layers-noise0.25-seed0-kl0"
    pooled = {"p": {**two.pooled["bt-128pairs-12layers-noise0.25-kl0"], "policies": [name], "seeds": 1}}
    said = answers(replace(two, pooled=pooled, policies={name: two.policies[name]}, policy_differences=[]), [])
    assert any(s.startswith("PPO against bt (one seed): gold peaked") for s in said.turns)
    assert "Whether PPO with other seeds would: there is one policy a condition." in said.unknown
    mixed = answers(replace(two, pooled={**two.pooled, **pooled}), [])
    assert "Whether PPO with other seeds would: there is one policy in 1 of 4 conditions." in mixed.unknown


def test_policies_that_turn_are_told_where_their_seeds_together_decide_nothing(two):
    name = "bt-128pairs-12layers-noise0.25-kl0"
    open_ = {name: {**two.pooled[name], "verdict": replace(two.pooled[name]["verdict"], kind=CANNOT_CONCLUDE)}}
    said = answers(replace(two, pooled=open_, policy_differences=[]), []).turns
    (singly,) = [s for s in said if s.startswith("PPO: gold")]
    first = two.policies[open_[name]["policies"][0]]
    assert "gold peaked and fell in 3 of 3 policies (bt, " in singly and f"by {first['drop'].mean:.2f} SD [" in singly
    assert singly.endswith("Their seeds differ too much to say it of a condition.")


def test_panels_that_are_compared_have_one_y_axis_and_legends_lie_beside_them(two, many):
    """Every figure: no legend within the axes."""
    for results in (two, many):
        main = [a for a in overoptimisation(results).axes if a.get_visible()]
        assert len({a.get_ylim() for a in main}) == 1 and len(main) > 1
        for name, figure in all_figures(results).items():
            figure.canvas.draw()
            legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
            frames = [a.get_window_extent() for a in figure.axes if a.get_visible()]
            for legend in legends:
                box = legend.get_window_extent().shrunk(0.98, 0.98)
                assert not any(box.overlaps(frame.shrunk(0.99, 0.99)) for frame in frames), name
        plotting.plt.close("all")


def test_bands_that_are_too_wide_do_not_flatten_the_curves(many):
    axis = overoptimisation(many).axes[0]
    low, high = axis.get_ylim()
    ys = np.concatenate([np.asarray(line.get_ydata()) for a in overoptimisation(many).axes for line in a.lines])
    assert high - low < 2.5 * np.ptp(ys)


def test_ensembles_are_drawn_beside_their_members(two):
    for method, kind, rules in (("bon", "bon", {"mean", "min", "uwo:0.5"}), ("ppo", "ppo_pooled", {"min"})):
        figure = ensembles(two, method)
        names = [t.get_text() for t in figure.legends[0].get_texts()]
        assert set(names) == rules | {"one reward model, mean over seeds"}
        drawn = [tuple(line.get_ydata()) for a in figure.axes for line in a.lines]
        for curve in (c for c in two.curves if c.method == kind and c.metric == "gold" and c.rm.startswith("bt")):
            assert tuple(curve.mean) in drawn, curve.rm
    assert ensembles(replace(two, findings={}, pooled={})) is None


def test_figures_of_a_page_can_be_read_aloud_and_share_no_id(html):
    text = html.read_text()
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(figures) > 10
    for svg in figures:
        assert 'role="img"' in svg.split(">")[0]
        label = re.search(r'aria-labelledby="([^"]+)"', svg)[1]
        assert re.search(f'<title id="{label}">[^<]+</title>', svg)
        ids = set(re.findall(r'\bid="([^"]+)"', svg))
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert used <= ids
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_every_colour_of_a_figure_has_one_for_dark_pages(html):
    """But those on coloured cells."""
    figures = "".join(re.findall(r"<svg.*?</svg>", html.read_text(), flags=re.S))
    fixed = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", figures))
    assert fixed <= {plotting.ON_LIGHT, plotting.ON_DARK}
    named = set(re.findall(r"var\((--c[0-9a-f]{6})\)", figures))
    light, dark = plotting.theme().split("@media")
    assert len(named) > 5 and all(name + ":" in light and name + ":" in dark for name in named)


@needs_browser
@pytest.mark.parametrize(("scheme", "dark"), [("0", True), ("1", False)])
def test_text_stands_out_from_the_page_in_both_modes(html, tmp_path, scheme, dark):
    """Contrast of at least 4.5 (WCAG AA) of the page's and the figures' text, as a browser computes its colours."""
    probe = """<script>
    const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255; return v <= .03928 ? v / 12.92 :
      ((v + .055) / 1.055) ** 2.4 }).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const contrast = c => (Math.max(c, paper) + .05) / (Math.min(c, paper) + .05);
    const of = (e, key) => contrast(light(getComputedStyle(e)[key]));
    const coloured = e => (e.getAttribute("style") || "").includes("fill");
    const text = [...document.querySelectorAll("svg text")].filter(e => !coloured(e));
    const plain = [...document.querySelectorAll("p, li, h1, h2, td")];
    document.title = ["worst", Math.min(...text.map(e => of(e, "fill"))), Math.min(...plain.map(e => of(e, "color"))),
      "paper", paper].join(" ");
    </script></body>"""
    copy = tmp_path / "page.html"
    copy.write_text(html.read_text().replace("</body>", probe))
    found = dom(copy.as_uri(), tmp_path / "profile", f"--blink-settings=preferredColorScheme={scheme}")
    of_figures, of_page, paper = map(float, re.search(r"worst ([\d.]+) ([\d.]+) paper ([\d.]+)", found).groups())
    assert of_figures > 4.5 and of_page > 4.5 and (paper < 0.1) is dark
